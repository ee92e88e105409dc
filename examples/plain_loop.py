"""Fine-tune with LoRA-One in a plain PyTorch loop.

python examples/plain_loop.py [model] [output folder]      the bundled model takes some seconds on a CPU
"""

import random
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_one

name = sys.argv[1] if len(sys.argv) > 1 else Path(lora_one.__file__).parent / "assets/tiny"
output = Path(sys.argv[2] if len(sys.argv) > 2 else "plain-loop-adapter")
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(name)

# Your data: pairs of prompt and response. The loss is on the response.
draw = random.Random(0)
numbers = [(draw.randint(2, 50), draw.randint(2, 50)) for _ in range(160)]
rows = [(f"Ann has {a} pens. She buys {b} more. How many pens now?\n", f"{a} + {b} = {a + b}") for a, b in numbers]
batches = lora_one.encode_batches(model, tokenizer, rows, batch_size=8)

# One call wraps the model. The first 8 examples give the gradient, and the next 8 choose the scale.
config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
model = lora_one.initialize_adapters(model, config, batches, method="LoRA-One")

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
model.train()
losses = []
for _ in range(2):
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")

# The adapter is plain LoRA for the original model, and README.md is its model card.
lora_one.save_adapter(model, output, data="160 generated sums", results={"training loss": round(losses[-1], 3)})
loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), output)
with torch.no_grad():
    difference = (loaded.eval()(**batches[0]).logits - model.eval()(**batches[0]).logits).abs().max().item()
print(f"saved and loaded: {output}, largest difference of the logits {difference:.1e}")
