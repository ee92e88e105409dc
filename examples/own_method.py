"""Try your own initialisation method: a function from a layer and its gradient to B and A.

python examples/own_method.py [model]      the bundled model takes some seconds on a CPU
"""

import random
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_one


def flat_step(layer, step):
    """Give all r directions of the descent step the same length: s B A = 0.001 ||W||_F / sqrt(r) U Vh.

    layer: shape (m, n), rank, scaling (s), weight().
    step: the best rank-r approximation of the descent direction -G, as U (m, r), S (r,) and Vh (r, n).
    """
    length = 0.001 * layer.weight().norm() / layer.rank**0.5
    root = (length / layer.scaling) ** 0.5
    return lora_one.AdapterFactors(B=root * step.U, A=root * step.Vh)


name = sys.argv[1] if len(sys.argv) > 1 else Path(lora_one.__file__).parent / "assets/tiny"
tokenizer = AutoTokenizer.from_pretrained(name)
draw = random.Random(0)
numbers = [(draw.randint(2, 50), draw.randint(2, 50)) for _ in range(160)]
rows = [(f"Ann has {a} pens. She buys {b} more. How many pens now?\n", f"{a} + {b} = {a + b}") for a, b in numbers]

# Compare it with methods of lora-one, under the same training.
for method in (flat_step, "lora_one", "lora", "pissa"):
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    batches = lora_one.encode_batches(model, tokenizer, rows)
    config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear")
    model = lora_one.initialize_adapters(model, config, batches, method=method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    title = method if isinstance(method, str) else method.__name__
    print(f"{title:10s} loss at the start {losses[0]:.3f}, in the last 5 steps {sum(losses[-5:]) / 5:.3f}")
