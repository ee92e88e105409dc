"""The recipes of docs/design.md work word for word, in a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

PARTS = ("lora_one", "conf", "hydra_plugins", "run_exp.py")
STEP = re.compile(r"^\d\. [^\n]*`([\w/.]+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def project(tmp_path):
    """A copy of the project, without tests and documents."""
    for part in PARTS:
        source, target = ROOT / part, tmp_path / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return tmp_path


def follow(recipe, project):
    """Write what each step of a section shows: a new file, or an addition to an existing one; see ``with_line``."""
    text = (ROOT / "docs/design.md").read_text().split(f"### {recipe}\n")[1].split("\n### ")[0]
    steps = STEP.findall(text)
    for name, shown in steps:
        path = project / name
        path.write_text(with_line(path.read_text(), shown) if path.exists() else shown)
    return [name for name, _ in steps]


def with_line(existing, shown):
    """Add a line to a table, after what it needs: an import among the imports, or a class before the table."""
    needed, table, entry = re.fullmatch(r"(.*?\n)(\w[^\n]*\{\n)([^\n]*\n)", shown, re.DOTALL).groups()
    assert existing.count(table) == 1, table
    if needed.startswith("from "):
        return existing.replace("\nfrom ", f"\n{needed.rstrip()}\nfrom ", 1).replace(table, table + entry)
    return existing.replace(table, needed + table + entry)


def run(project, *overrides):
    """run_exp.py of the copy, in a process of its own."""
    command = [sys.executable, "run_exp.py", "wandb.mode=disabled", "results_dir=results", *overrides]
    environment = os.environ | {"PYTHONPATH": str(project)}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


def test_a_method_takes_four_places(project):
    places = follow("An initialisation method", project)
    assert len(places) == 4
    small = ("dataset.train_size=16", "dataset.validation_size=4", "dataset.accuracy_examples=0", "dataset.cache=null")
    done = run(project, "init=mine", "init.size=0.2", "model.epochs=0", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (project / "results").glob("*/Mine-r8-a16-*/*/run.json")
    record = json.loads(record.read_text())
    assert record["init"]["method"] == "Mine" and record["status"] == "finished"
    assert record["config"]["init"]["method"] == "mine" and record["config"]["init"]["size"] == 0.2
    refused = run(project, "init=mine", "++init.sise=0.2")
    assert refused.returncode == 2 and "did you mean init.size?" in refused.stderr


def test_a_data_set_takes_three_places(project):
    places = follow("A data set", project)
    assert len(places) == 3
    file = project / "rows.jsonl"
    file.write_text("".join(json.dumps({"q": f"{i} + 1?", "a": str(i + 1)}) + "\n" for i in range(20)))
    small = ("init=lora", "model.real_batch_size=8", "model.per_device_batch_size=8", "dataset.cache=null")
    done = run(project, "dataset=mine", f"dataset.path={file}", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (project / "results").glob("lora-one_mine/*/*/run.json")
    record = json.loads(record.read_text())
    assert record["train"]["steps"] == 3 and record["data"]["validation"]["whole"] == 2


def test_an_optimizer_takes_three_places(project):
    """It trains; a wrong value, and a wrong class in the settings, are refused."""
    places = follow("An optimizer", project)
    assert len(places) == 3
    small = ("init=lora", "dataset.train_size=16", "dataset.validation_size=4", "dataset.accuracy_examples=0")
    steps = (
        "model.real_batch_size=8",
        "model.per_device_batch_size=8",
        "dataset.cache=null",
        "model.learning_rate=1e-3",
    )
    done = run(project, "optimizer=mine", "optimizer.momentum=0.8", *small, *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (project / "results").glob("*/LoRA-kaiming-r8-a16-mine-*/*/run.json")
    record = json.loads(record.read_text())
    assert record["train"]["steps"] == 2 and record["config"]["optimizer"] == {"name": "mine", "momentum": 0.8}
    refused = run(project, "optimizer=mine", "optimizer.momentum=1")
    assert refused.returncode == 2 and "optimizer.momentum=1.0 is out of range" in refused.stderr
    settings = project / places[1]
    settings.write_text(settings.read_text().replace("lora_one.optim.mine.Mine", "lora_one.optim.mine.Mime"))
    refused = run(project, "optimizer=mine")
    assert refused.returncode == 2 and "no attribute 'Mime'" in refused.stderr
    assert "Loading weights" not in refused.stderr
    assert "correct MineConfig.implementation in lora_one/config/optimizers.py" in refused.stderr
