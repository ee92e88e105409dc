"""Fine-tune on your own data: write it as JSON lines, run one command, and use the adapter.

python examples/own_dataset.py [results folder] [further settings]      the bundled model takes half a minute on a CPU
"""

import json
import random
import subprocess
import sys
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

results = Path(sys.argv[1] if len(sys.argv) > 1 else "results")
project = Path(__file__).resolve().parents[1]

# One object a line, with any names for the columns. The task: find the number of the ticket in a sentence.
draw = random.Random(0)
tickets = [(draw.randint(10, 99), draw.randint(2, 9)) for _ in range(1000)]
rows = [
    {"question": f"Ann has ticket {number} and pays {price} dollars. What is her ticket?\n", "reply": f"{number}"}
    for number, price in tickets
]
results.mkdir(parents=True, exist_ok=True)
data = results / "shop.jsonl"
data.write_text("".join(json.dumps(row) + "\n" for row in rows))

command = [
    sys.executable,
    str(project / "run_exp.py"),
    "model=tiny",
    "dataset=json",
    f"dataset.path={data.resolve()}",
    "dataset.prompt=question",
    "dataset.response=reply",
    "dataset.validation_size=0.1",
    "model.learning_rate=5e-3",
    "model.epochs=2",
    "model.eval_epochs=1",
    f"results_dir={results.resolve()}",
    *sys.argv[2:],
]
subprocess.run(command, check=True)

# The last run of this folder. run.json says what was run, and adapter/ is plain PEFT.
run_json = max(results.rglob("run.json"), key=lambda file: file.stat().st_mtime)
base = json.loads((run_json.parent / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run_json.parent / "adapter")
for row in rows[-3:]:  # of the last tenth, which is for validation
    prompt = tokenizer(row["question"], return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    answer = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"answer {answer}, expected {row['reply']}: {row['question'].strip()}")
