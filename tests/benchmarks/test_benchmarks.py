"""The benchmarks run and write what they promise; their times are nobody's test."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


def run(script, folder, *options):
    """Run a benchmark once; return what it prints and its JSON."""
    file = folder / f"{script}.json"
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *options, f"--json={file}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert {"machine", "versions", "rows", "ratios"} <= result.keys()
    return done.stdout, result


def run_small(script, folder, *options):
    """Run a benchmark at its smallest shape; return its JSON."""
    printed, result = run(script, folder, "--shape=small", "--threads=1", "--repeats=1", "--markdown", *options)
    assert "| case " in printed
    assert {"cpu", "cores", "threads"} <= result["machine"].keys() and "torch" in result["versions"]
    names = [row["name"] for row in result["rows"]]
    assert len(set(names)) == len(names)
    assert all(isinstance(ratio, float) for ratio in result["ratios"].values())
    return result


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_small("bench_init", tmp_path_factory.mktemp("benchmarks"))


def test_every_way_to_an_initialisation_has_its_row(result):
    names = [row["name"] for row in result["rows"]]
    for kind in (
        "floor",
        "device",
        "fused",
        "sketched",
        "GoRA",
        "LoRA-DA",
        "low-rank step",
        "PEFT LoRA-GA",
        "official",
    ):
        assert any(name.startswith(kind) for name in names), kind
    for row in result["rows"]:
        assert all(value is None or isinstance(value, str | int | float) for value in row.values())
        assert row["seconds"] > 0 and row["ratio_to_floor"] > 0


def test_every_way_captures_the_energy(result):
    without = ("floor", "GoRA", "LoRA-DA")  # their A is random, or holds other directions
    energies = {row["name"]: row["energy"] for row in result["rows"] if not row["name"].startswith(without)}
    assert all(energy >= 0.999 for energy in energies.values()), energies


def test_fused_holds_one_gradient_at_a_time(result):
    """All fourteen gradients together are eight times the largest."""
    assert result["ratios"]["fused: held / largest gradient"] < 3


def test_spectra_of_every_type_of_layer(tmp_path):
    result = run_small("bench_spectra", tmp_path)
    assert {row["name"]: row["layers"] for row in result["rows"]}["all"] == len(result["layers"]) == 14
    for values in result["layers"].values():
        assert values["s1/s9"] >= 1
        assert 0 < values["energy, r=8"] <= values["energy, r=16"] <= values["energy, r=64"] <= 1 + 1e-9


def test_optimizers_are_compared_at_every_rank_and_take_the_exact_step(tmp_path):
    result = run_small("bench_optimizer", tmp_path, "--ranks", "4,8")
    rows = {row["name"]: row for row in result["rows"]}
    for rank in (4, 8):
        for name in ("fused AdamW", "ours", "PEFT"):
            row = rows[f"{name}, r={rank}"]
            assert row["seconds"] > 0 and row["peak_extra_mib"] >= 0 and 0 < row["share_of_training_step"] < 1
            assert (row["error"] is None) == (name == "fused AdamW") and (row["error"] or 0) < 1e-4
        assert f"own time, ours / PEFT, r={rank}" in result["ratios"]
        assert result["ratios"][f"step, ours / fused AdamW, r={rank}"] == pytest.approx(
            rows[f"ours, r={rank}"]["seconds"] / rows[f"fused AdamW, r={rank}"]["seconds"]
        )
        for name in ("LoRA-Muon", "LoRA-RITE", "LoRA-Pro, one decoder layer x 2"):
            assert rows[f"{name}, r={rank}"]["seconds"] > 0
            assert f"step, {name} / fused AdamW, r={rank}" in result["ratios"]
        moments = 8 * 2 * (4 * 64 * 64 + 3 * 64 * 288)  # bytes, of two decoder layers
        assert rows[f"LoRA-Pro, one decoder layer x 2, r={rank}"]["peak_extra_mib"] * 2**20 > moments


def test_ways_to_train_agree_and_are_written(tmp_path):
    """The script itself refuses losses that differ."""
    options = ("--steps=2", "--size=8", "--threads=1", "--repeats=1", "--shape=small", "--max_length=128", "--markdown")
    _, result = run("bench_train", tmp_path, *options)
    names = [row["name"] for row in result["rows"]]
    for kind in ("Trainer + PEFT, 1", "Trainer + PEFT, 8", "ours, 1", "ours, 8 at", "ours, 8 packed", "ours, 8, check"):
        assert any(name.startswith(kind) for name in names), kind
    assert all(0 < row["slowest"] <= row["examples_per_second"] <= row["fastest"] for row in result["rows"])
    assert all(row["loss_difference"] <= 1e-5 for row in result["rows"])
    assert "ours, 8 at a time / Trainer + PEFT, 1 at a time" in result["ratios"]


@pytest.mark.long
def test_the_plan_predicts_memory_and_traffic(tmp_path):
    """Memory within 15 %; collective operations to the byte, apart from DDP's own messages of less than 10 kB."""
    result = run_small("bench_plan", tmp_path)
    cases = ("init, every gradient on the device", "init, sketch", "init, layer by layer", "training")
    bases = ("one process", "4 processes", "sharded over 4", "sharded over 2 of 4")
    assert [row["name"] for row in result["rows"]] == [f"{base}: {case}" for base in bases for case in cases]
    for row in result["rows"]:
        assert 0.85 < row["ratio"] < 1.15, row
        predicted, counted = row["operations_predicted"], row["operations_measured"]
        for kind, number in predicted.items():
            if "sketch" in row["name"]:  # layers that have settled send nothing, and the passes may be fewer
                assert counted[kind] <= number
            elif "training" in row["name"]:
                assert 0 <= counted[kind] - number < 10_000
            else:
                assert counted[kind] == number


@pytest.mark.long
def test_evaluations_agree_and_are_written(tmp_path):
    """The script itself refuses answers of the two ways that differ."""
    options = ("--questions=3", "--problems=3", "--commonsense=1", "--programs=3", "--new_tokens=4")
    options += ("--threads=1", "--repeats=1")
    _, result = run("bench_eval", tmp_path, *options)
    examples = {"mmlu": 3, "gsm8k": 3}
    examples |= dict.fromkeys(("commonsense greedy", "commonsense beams", "commonsense likelihood"), 8)
    examples |= {"humaneval": 3}
    names = {f"{task}, {way}": count for task, count in examples.items() for way in ("one by one", "in batches")}
    assert {row["name"]: row["examples"] for row in result["rows"]} == names
    assert all(row["examples_per_cpu_second"] > 0 for row in result["rows"])
    assert list(result["ratios"]) == [f"{task}: in batches / one by one" for task in examples]
    assert all(isinstance(ratio, float) for ratio in result["ratios"].values())


@pytest.mark.long
def test_encodings_agree_and_are_written(tmp_path):
    """The script itself refuses examples that differ from case to case."""
    printed, result = run("bench_data", tmp_path, "--examples=200", "--repeats=1", "--markdown")
    assert "| case " in printed
    assert [row["name"] for row in result["rows"]] == ["lists", "packed, nothing kept yet", "kept before"]
    assert len({row["tokens"] for row in result["rows"]}) == 1 and result["rows"][0]["examples"] == 200
    assert all(isinstance(ratio, float) for ratio in result["ratios"].values())


def test_engines_are_timed_and_what_cannot_be_is_said(tmp_path):
    options = ["--examples=2", "--max_new_tokens=4", "--vllm=/nowhere"]
    file = tmp_path / "engines.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_engines.py", *options, f"--json={file}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "vLLM was not measured: --vllm=/nowhere" in done.stdout
    (row,) = json.loads(file.read_text())["rows"]
    assert row["examples"] == 2 and row["seconds"] > 0


@pytest.mark.long
def test_large_data_has_its_stages(tmp_path):
    printed, result = run("bench_large_data", tmp_path, "--rows=20000", "--shuffled", "--markdown")
    stages = [row["name"] for row in result["rows"]]
    assert len(stages) == len(set(stages)) >= 4 and all(stage in printed for stage in stages)
    assert all(row["rows"] == 20_000 and row["seconds"] >= 0 for row in result["rows"])


@pytest.mark.long
def test_sweeps_and_reports_have_their_rows(tmp_path):
    """Of five methods with one seed."""
    _, result = run("bench_sweeps", tmp_path, "--jobs=5", "--runs=10", "--seeds=1", "--train=1")
    names = [row["name"] for row in result["rows"]]
    kinds = ("finished, 5", "locking, 5", "final table, 5", "dry, 5", "report, 10 runs", "trained, 1")
    assert all(any(name.startswith(kind) for name in names) for kind in kinds), names
    assert all(row["cpu_seconds"] > 0 and row["peak_mib"] > 0 for row in result["rows"])
