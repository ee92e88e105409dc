"""A comparison that is killed three times gives the report of one that was never stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from lora_one.reports.pages import write_report
from tests.helpers.comparison_records import without
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

CONTENT = {
    "title": "Three methods",
    "common": ["wandb.mode=disabled"],
    "test": ["dataset.data_seed=1"],
    "test_examples": 40,
    "tuning_seeds": [1],
    "shared_seeds": "fewer runs",
    "baseline": "LoRA",
}
STEPS_20 = {  # of the bundled model
    "common": [
        "dataset.train_size=320",
        "dataset.validation_size=32",
        "dataset.accuracy_examples=0",
        "model.real_batch_size=16",
        "model.per_device_batch_size=16",
        "wandb.mode=disabled",
    ]
}
SMALL = {
    "seeds": [1, 2],
    "grid": {"model.learning_rate": [5e-3, 2e-2]},
    "methods": {"LoRA": ["init=lora"], "LoRA-One": ["init=lora_one"]},
}
WHOLE = {
    "seeds": [1, 2, 3],
    "grid": {"model.learning_rate": [1e-3, 5e-3, 2e-2]},
    "methods": {"LoRA": ["init=lora"], "LoRA-One": ["init=lora_one"], "PiSSA": ["init=pissa"]},
}


def start(folder, content):
    """Start the comparison in a folder of its own, so that the paths of the runs are the same in two of them."""
    folder.mkdir(exist_ok=True)
    (folder / "three.yaml").write_text(yaml.safe_dump(CONTENT | content))
    command = [sys.executable, str(ROOT / "scripts/compare.py"), "three.yaml", "--output=out", "--threads=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished_runs(folder):
    """Return how many runs have finished; a run.json that is being replaced counts as it was.

    Not rglob: it also reads the folders of resume points, which disappear meanwhile.
    """
    return sum('"status": "finished"' in file.read_text() for file in folder.glob("results/*/*/*/run.json"))


def report_of(folder, output):
    """Write the report on a comparison without its times; return the content of each file by its name."""
    record = json.loads((folder / "out" / "comparison.json").read_text())
    write_report("Three methods", {"": without(record) | {"date": "", "machine": ""}}, output)
    return {file.name: file.read_bytes() for file in output.rglob("*.*")}


@pytest.mark.parametrize(
    ("content", "kills"),
    [
        pytest.param(STEPS_20 | SMALL, (3,), id="small"),
        pytest.param(STEPS_20 | WHOLE, (2, 8, 17), id="whole", marks=pytest.mark.long),
        pytest.param(WHOLE, (2, 8, 17), id="all-steps", marks=pytest.mark.long),
    ],
)
def test_killed_several_times_gives_the_same_report(content, kills, tmp_path):
    """kills: after so many finished runs."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for enough in kills:
        process = start(killed, content)
        end = time.monotonic() + 3600
        while finished_runs(killed) < enough:
            assert process.poll() is None and time.monotonic() < end, process.stdout.read()
            time.sleep(0.05)
        time.sleep(0.5)  # in the middle of the next run
        process.send_signal(signal.SIGKILL)
        process.communicate()
    for folder in (killed, alone):
        process = start(folder, content)
        said, _ = process.communicate(timeout=7200)
        assert process.returncode == 0, said
    whole, parts = report_of(alone, tmp_path / "first"), report_of(killed, tmp_path / "second")
    assert whole.keys() == parts.keys() and {"report.html", "report.md", "report.tex", "epochs.svg"} <= whole.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []
