"""benchmarks/gpu.py: its tables go on where they stopped, and every part runs at a small size without a GPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from rows import Table, timed

sys.path.append(str(ROOT / "benchmarks"))


SETTINGS = {"shape": "small"}


def table(folder, seconds=60.0, settings=SETTINGS):
    return Table(folder, "part", "cpu", settings, seconds)


def on_disk(folder):
    return json.loads((folder / "part.json").read_text())


def failing():
    raise ValueError("a|b\nno memory")


def test_a_row_that_was_measured_is_not_measured_again(tmp_path):
    table(tmp_path).row("one", lambda: {"seconds": 1.5})
    again = table(tmp_path)
    assert again.row("one", failing) == again.rows[0] and again.value("one") == 1.5
    assert [row["name"] for row in on_disk(tmp_path)["rows"]] == ["one"]
    table(tmp_path, settings={"shape": "large"}).row("one", lambda: {"seconds": 2.5})
    assert on_disk(tmp_path)["rows"][0]["seconds"] == 2.5, "of other settings it is another row"


def test_failed_row_is_reported_and_retried_and_keeps_the_others(tmp_path):
    first = table(tmp_path)
    first.row("one", lambda: {"seconds": 1.5})
    assert first.row("two", failing) is None
    first.row("three", lambda: {"seconds": 3.5})
    rows = on_disk(tmp_path)["rows"]
    assert [row["name"] for row in rows] == ["one", "two", "three"]
    assert "ValueError" in rows[1]["error"] and "in failing" in rows[1]["traceback"]
    text = (tmp_path / "part.md").read_text()
    assert "- failed: two: ValueError: a/b no memory" in text and "| three" in text
    again = table(tmp_path)
    again.row("two", lambda: {"seconds": 2.5})
    assert [row["name"] for row in on_disk(tmp_path)["rows"]] == ["one", "three", "two"]


def test_no_row_starts_after_the_time_limit(tmp_path):
    late = table(tmp_path, seconds=-1.0)
    assert late.row("one", failing) is None
    assert on_disk(tmp_path)["rows"] == [] and on_disk(tmp_path)["not_measured_for_want_of_time"] == ["one"]
    assert "not measured before the time limit: one" in (tmp_path / "part.md").read_text()


def test_slow_work_is_not_done_again_after_its_warm_up():
    calls = []
    assert timed(lambda: calls.append(1), seconds=-1.0)["turns"] and len(calls) == 1
    assert len(timed(lambda: calls.append(1), repeats=2, seconds=60.0)["turns"]) == 2 and len(calls) == 4


def gpu(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# part -> beginnings of the names of its rows
ROWS = {
    "init": (
        "passes",
        "floor",
        "ours, auto",
        "ours, low",
        "initialize_adapters, scale=search",
        "official",
        "PEFT LoRA-GA",
    ),
    "optimizer": ("fused AdamW", "ours", "PEFT", "LoRA-Muon", "LoRA-RITE"),
    "train": ("ours, 1", "Trainer + PEFT, 1", "ours, 4 at", "Trainer + PEFT, 4", "ours, 4 packed"),
    "plan": ("init, every gradient on the device", "init, sketch", "init, layer by layer", "training"),
    "eval": ("gsm8k, one", "gsm8k, in", "mmlu, one", "mmlu, in"),
    "gemma": (
        "LoRA, learning rate",
        "LoRA-One, learning rate",
        "LoRA-GA, learning rate",
        "test, pretrained",
        "test, LoRA-GA",
    ),
    "distributed": ("LoRA, 2 processes",),
    "correctness": ("test_gradient_in_bf16", "test_start", "test_whole_run", "test_killed", "test_generation"),
}


LONG = {"correctness", "gemma", "train", "distributed", "init", "optimizer"}  # minutes together


@pytest.mark.slow
@pytest.mark.parametrize("part", [pytest.param(part, marks=[pytest.mark.long] * (part in LONG)) for part in ROWS])
def test_every_part_runs_small_without_a_gpu(part, tmp_path):
    """No row fails; the report has the part and names the others as not run yet."""
    done = gpu(part, "--small", "--device=cpu", "--seconds=3600", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    result = json.loads((tmp_path / f"{part}.json").read_text())
    names = [row["name"] for row in result["rows"]]
    assert all(any(name.startswith(start) for name in names) for start in ROWS[part]), names
    assert not [row for row in result["rows"] if "error" in row]
    assert result["machine"]["device"] == "cpu" and result["versions"]["torch"]
    report = gpu("report", f"--out={tmp_path}").stdout
    assert f"## {part}" in report and "Not run yet: " in report and part not in report.rpartition("Not run yet: ")[2]


@pytest.mark.slow
@pytest.mark.long
def test_gemma_slices_divide_the_runs(tmp_path):
    """Two slices hold every run once; without a slice none is trained again, and the test problems come on top."""
    slices = []
    for number in (1, 2):
        assert gpu(f"gemma:{number}/2", "--small", "--device=cpu", f"--out={tmp_path}").returncode == 0
        slices.append({row["name"] for row in json.loads((tmp_path / f"gemma-{number}of2.json").read_text())["rows"]})
    assert len(slices[0]) == len(slices[1]) == 6 and not slices[0] & slices[1]
    whole = gpu("gemma", "--small", "--device=cpu", f"--out={tmp_path}")
    assert whole.stdout.count("already finished:") == 12
    rows = json.loads((tmp_path / "gemma.json").read_text())["rows"]
    assert {row["name"] for row in rows} > slices[0] | slices[1]


def test_an_unknown_part_is_refused(tmp_path):
    done = gpu("corectness", f"--out={tmp_path}")
    assert done.returncode == 2 and "corectness is not a part" in done.stderr
