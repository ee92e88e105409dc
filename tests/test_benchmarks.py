"""The benchmarks run and write what they promise; their times are nobody's test."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmarks") / "init.json"
    script = ROOT / "benchmarks/bench_init.py"
    command = [sys.executable, str(script), "--shape", "small", "--repeats", "1", "--threads", "1"]
    done = subprocess.run(
        [*command, "--json", str(file), "--markdown"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| case " in done.stdout
    return json.loads(file.read_text())


def test_format(result):
    assert {"machine", "versions", "rows", "ratios"} <= result.keys()
    assert {"cpu", "cores", "threads"} <= result["machine"].keys() and "torch" in result["versions"]
    names = [row["name"] for row in result["rows"]]
    assert len(set(names)) == len(names)
    for kind in ("floor", "device", "fused", "sketched", "low-rank step", "PEFT LoRA-GA", "official"):
        assert any(name.startswith(kind) for name in names), kind
    for row in result["rows"]:
        assert all(value is None or isinstance(value, str | int | float) for value in row.values())
        assert row["seconds"] > 0 and row["ratio_to_floor"] > 0
    assert all(isinstance(ratio, float) for ratio in result["ratios"].values())


def test_every_way_captures_the_energy(result):
    energies = {row["name"]: row["energy"] for row in result["rows"] if not row["name"].startswith("floor")}
    assert all(energy >= 0.999 for energy in energies.values()), energies


def test_fused_holds_one_gradient_at_a_time(result):
    """All fourteen gradients together are eight times the largest."""
    assert result["ratios"]["fused: held / largest gradient"] < 3
