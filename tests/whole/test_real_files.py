"""Every kind of real file, through the command line, into a few steps of a real pretrained model."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from lora_one.files import read_lines
from tests.helpers.paths import ROOT, shared

pytestmark = pytest.mark.slow
# data set, its file or folder, how many rows that holds, tokens that training takes of one
FILES = [
    ("gsm8k", "gsm8k", 7473, 256),
    ("alpaca", "instruct/code_alpaca_2k.json", 2017, 256),
    ("commonsense_reasoning", "commonsense/openbookqa/train.json.gz", 4957, 384),
    ("cola", "glue/CoLA", 8551 + 1043, 128),
    ("mrpc", "glue/MRPC", 3668 + 408, 256),
    ("gsm8k", "gsm8k/train.jsonl.gz", 7473, 384),
    ("alpaca", "instruct/alpaca_random_9k.json.gz", 9229, 384),
    ("alpaca", "instruct/alpaca_en_demo.json", 999, 384),
    ("alpaca", "instruct/new_codealpaca.json.gz", 4535, 384),
    ("commonsense_reasoning", "commonsense", 17754, 384),
    ("sst2", "glue/SST-2", 67349 + 872, 128),
    ("rte", "glue/RTE", 2490 + 277, 384),
    ("qnli", "glue/QNLI/dev.tsv.gz", 5463, 256),
]


@pytest.mark.parametrize(("name", "path", "rows", "length"), FILES, ids=[path for _, path, _, _ in FILES])
def test_a_real_model_learns_from_real_files(name, path, rows, length, tmp_path, monkeypatch, capsys):
    """16 examples, three times: the loss of the last epoch, two steps, is below that of the first."""
    arguments = [
        f"dataset={name}",
        f"dataset.path={shared('data')}/{path}",
        "dataset.max_train_samples=16",
        "dataset.max_eval_samples=4",
        f"dataset.cache={tmp_path / 'cache'}",
        "model=llama",
        f"model.name={shared('models/stories260K-hf')}",
        "model.bf16=false",
        f"model.max_length={length}",
        "model.epochs=3",
        "model.learning_rate=2e-3",
        "model.real_batch_size=8",
        "model.per_device_batch_size=8",
        "model.logging_steps=1",
        "wandb.mode=disabled",
        f"results_dir={tmp_path / 'results'}",
    ]
    monkeypatch.setattr(sys, "argv", ["run_exp.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "run_exp.py"), run_name="__main__")
    assert stop.value.code == 0, capsys.readouterr().err
    record = json.loads(Path(capsys.readouterr().out.rstrip().rpartition("run: ")[2]).read_text())
    assert record["status"] == "finished" and record["data"]["rows"] == rows
    assert sum(record["data"]["train"].values()) == 16 and record["data"]["train"]["dropped"] < 4
    (metrics,) = (tmp_path / "results").rglob("metrics.jsonl")
    losses = [line["loss"] for line in read_lines(metrics) if "loss" in line]
    assert len(losses) == 6 and sum(losses[-2:]) < sum(losses[:2])
