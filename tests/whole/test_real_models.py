"""Whole experiments on real pretrained models: Gemma 3 270M, a language model, and MiniLM, a BERT encoder."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lora_one.evaluation.command import main
from tests.helpers.paths import real_model, shared
from tests.helpers.runs import finish, logits_at_saving, run_config

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


def test_lora_one_on_gemma_and_gsm8k(tmp_path, monkeypatch):
    """Plain PEFT loads the trained function bit for bit, and the merged model is the same up to rounding."""
    base, data = real_model("gemma-3-270m-hf"), shared("data/gsm8k")
    ids = torch.tensor(
        [AutoTokenizer.from_pretrained(base)("Q: Tom has 3 apples and buys 4. How many?\nA: ")["input_ids"]]
    )
    logits = logits_at_saving(monkeypatch, ids)
    run = run_config(
        f"results_dir={tmp_path}",
        "dataset=gsm8k",
        f"dataset.path={data}",
        "dataset.max_train_samples=12",
        "dataset.train_size=8",
        "dataset.validation_size=4",
        "dataset.accuracy_examples=0",
        "model=llama",
        f"model.name={base}",
        "model.bf16=false",
        "model.max_length=256",
        "model.real_batch_size=4",
        "model.saving=true",
        "init.bsz=1",
        "init.iters=4",
    )
    folder = finish(run)
    record = folder.read()
    assert (record["init"]["method"], record["init"]["examples"], record["train"]["steps"]) == ("LoRA-One", 4, 2)
    assert len(record["init"]["relative_shift"]) == 18 * 7
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder.adapter)
        )
        assert torch.equal(adapted.eval()(ids).logits, logits["trained"])
        del adapted
        merged = AutoModelForCausalLM.from_pretrained(folder.merged)
        largest = float(logits["trained"].abs().max())
        assert (merged.eval()(ids).logits - logits["trained"]).abs().max() <= 1e-4 * largest
