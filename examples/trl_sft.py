"""Fine-tune with TRL's SFTTrainer, starting from LoRA-One. Needs: pip install 'lora-one[trl]'

python examples/trl_sft.py [model] [output folder]      the bundled model takes some seconds on a CPU
"""

import random
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lora_one

name = sys.argv[1] if len(sys.argv) > 1 else Path(lora_one.__file__).parent / "assets/tiny"
output = Path(sys.argv[2] if len(sys.argv) > 2 else "trl-sft")
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(name)

draw = random.Random(0)
numbers = [(draw.randint(2, 50), draw.randint(2, 50)) for _ in range(160)]
rows = [(f"Ann has {a} pens. She buys {b} more. How many pens now?\n", f"{a} + {b} = {a + b}") for a, b in numbers]

# Sixteen rows are enough: eight for the gradient, eight for the search for the scale.
config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
model = lora_one.initialize_adapters(model, config, lora_one.encode_batches(model, tokenizer, rows[:16]))

# The model is already a PeftModel, so SFTTrainer gets no peft_config and does not build another one.
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=str(output),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=5,
        bf16=False,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list([{"prompt": prompt, "completion": response} for prompt, response in rows]),
    processing_class=tokenizer,
    callbacks=[lora_one.AdapterCallback(data="160 generated sums")],  # writes <output folder>/adapter
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, adapter for the original model: {output / 'adapter'}")
