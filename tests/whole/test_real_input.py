"""Whole experiments on real weights and real problems, and the published command line on rows of its data's format."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_one.datasets.arithmetic import generate_meta_math
from lora_one.evaluation.command import main
from lora_one.files import read_lines
from tests.helpers.paths import ROOT, shared
from tests.helpers.runs import PUBLISHED, finish, run_config

pytestmark = pytest.mark.slow


@pytest.mark.long
@pytest.mark.parametrize("init", ["gradient", "default"])
def test_stories_on_gsm8k_loses_a_fifth_of_its_loss_in_an_epoch(tmp_path, init):
    model, data = shared("models/stories260K-hf"), shared("data/gsm8k")
    overrides = ("experiment=stories_gsm8k", f"model.name={model}", f"dataset.path={data}", f"init={init}")
    folder = finish(run_config(*overrides, "model.saving=true", f"results_dir={tmp_path}"))
    losses = [line["loss"] for line in read_lines(folder.metrics) if "loss" in line]
    assert folder.read()["status"] == "finished" and len(losses) == 63
    assert sum(losses[-10:]) <= 0.8 * sum(losses[:10])
    assert main("gsm8k", [f"--model_name={folder.merged}", f"--data_path={data / 'test.jsonl'}", "--limit=20"]) == 0
    counts = json.loads((folder.path / "eval/gsm8k/metrics.json").read_text())["counts"]
    assert counts["correct"] + counts["wrong"] + counts["unparsed"] == counts["total"] == 20


def test_published_training_command(tmp_path):
    """As written, with only the model, the data and the lengths set for this machine."""
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in generate_meta_math(500, seed=0)))
    local = f" model.name={shared('models/stories260K-hf')} model.bf16=false dataset.path={rows} model.max_length=256"
    command = f"-m {PUBLISHED['meta_math']}{local} init.max_length=256 results_dir={tmp_path / 'results'}"
    arguments = [sys.executable, "run_exp.py", *command.split()]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith("run: ")
    record = json.loads(Path(last.removeprefix("run: ")).read_text())
    assert record["status"] == "finished" and record["config"]["seed"] == 9
    folder = tmp_path / "results/lora-one_meta_math" / f"enter-name-here-{record['config_hash'][:8]}" / "9"
    assert (folder / "merged_checkpoint/model.safetensors").exists()
