"""Whole experiments on real pretrained models: Gemma 3 270M, a language model, and MiniLM, a BERT encoder."""

import json

import pytest
import torch
from conftest import finish, real_model, run_config, shared
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_one.evaluation.command import main

pytestmark = pytest.mark.slow


def test_minilm_with_a_new_head_on_mrpc(tmp_path):
    """Trained, merged and scored; plain PEFT loads the adapter with its head, to the same classes."""
    base, data = real_model("minilm-l6"), shared("data/glue/MRPC")
    run = run_config(
        f"results_dir={tmp_path}",
        "dataset=mrpc",
        f"dataset.path={data}",
        "dataset.max_train_samples=64",
        "dataset.max_eval_samples=16",
        "model=roberta_large",
        f"model.name={base}",
        "model.type=SequenceClassification",
        "model.per_device_batch_size=16",
        "model.learning_rate=2e-3",
        "model.saving=true",
    )
    folder = finish(run)
    record = folder.read()
    assert record["train"]["steps"] == 2 and 0 <= record["evaluation"]["final"]["eval_accuracy"] <= 1
    options = ["--dataset=mrpc", f"--data_path={data}", "--limit=24"]
    assert main("glue", [f"--model_name={folder.merged}", *options]) == 0
    lines = (folder.path / "eval/glue/mrpc/predictions.jsonl").read_text().splitlines()
    assert len(lines) == 24 and not any(json.loads(line)["prediction"] is None for line in lines)
    pairs = (["He said it was late.", "Two"], ["It was late, he said.", "Shares fell."])
    batch = AutoTokenizer.from_pretrained(base)(*pairs, padding=True, return_tensors="pt")
    adapted = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), str(folder.adapter))
    merged = AutoModelForSequenceClassification.from_pretrained(folder.merged)
    with torch.no_grad():
        expected, found = (model.eval()(**batch).logits for model in (adapted, merged))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
