"""``lora-one-compare --curvature``: the eigenvalue of every method, and learning rates in inverse proportion."""

import doctest

import pytest

from lora_one.runs import comparison_curvature
from lora_one.runs.compare_command import main
from lora_one.runs.comparison_curvature import curvature
from lora_one.runs.comparison_file import Comparison
from lora_one.runs.experiment import execute
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL, run_config


def compose(overrides):
    return run_config(*overrides)


def comparison(folder, **changes):
    settings = {
        "title": "methods",
        "common": [*SMALL, f"results_dir={folder}", "dataset.train_size=16"],
        "test": [],
        "test_examples": 1,
        "tuning_seeds": [3],
        "seeds": [4, 5],
        "grid": {"model.learning_rate": [1e-3, 4e-3]},
        "methods": {"LoRA": ["init=lora"], "LoRA-One": ["init=lora_one"]},
        "baseline": "LoRA",
    }
    return Comparison(**settings | changes)


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_a_method_with_four_times_the_eigenvalue_gets_a_quarter_of_the_rates(tmp_path, monkeypatch):
    by_rate = {1e-3: 2.0, 2e-3: 8.0, 3e-3: -1.0, 4e-3: 6.0}  # the methods differ in a key that says which one it is

    def measured(located, execute):
        value = by_rate[located.run.model.learning_rate]
        rest = {"converged": False, "error": 0.5, "products": 100} if value == 8.0 else {"converged": True}
        return {"largest_eigenvalue": value} | rest

    monkeypatch.setattr("lora_one.runs.comparison_curvature.measured_curvature", measured)
    methods = {
        "LoRA": ["model.learning_rate=1e-3"],
        "LoRA-One": ["model.learning_rate=2e-3"],
        "negative": ["model.learning_rate=3e-3"],
        "Muon": ["model.learning_rate=4e-3", "optimizer=lora_muon"],
    }
    rows = cells(curvature(comparison(tmp_path, methods=methods), compose, execute, 4).text)[:-2]
    assert rows[0] == ["method", "largest eigenvalue", "relative to LoRA", "learning rates at this ratio"]
    assert rows[2:] == [
        ["LoRA", "2", "1", "0.001, 0.004"],
        ["LoRA-One", "8 (not converged: error up to 0.5 after 100 products)", "4", "0.00025, 0.001"],
        ["negative", "-1", "", ""],
        ["Muon", "6", "3", "another optimizer than LoRA"],
    ]


def test_starts_are_measured_once_and_a_method_without_adapters_says_why(tmp_path):
    done = []

    def counted(run):
        done.append(run)
        return execute(run)

    methods = {"LoRA": ["init=lora"], "full": ["init=lora", "peft=full_ft"]}
    asked = comparison(tmp_path, methods=methods)
    table = curvature(asked, compose, counted, 2)
    rows = cells(table.text)
    assert table.measured == 1
    assert len(done) == 1 and done[0].model.epochs == 0 and done[0].seed == 3
    record = next(tmp_path.glob("curvature/**/run.json")).read_text()
    assert f"{float(rows[2][1]):.3g}"[:3] in record and '"examples": 2' in record
    assert rows[3][0] == "full" and "works only with adapters" in rows[3][1]
    assert curvature(asked, compose, counted, 2) == table and len(done) == 1
    curvature(asked, compose, counted, 3)  # another number of examples is measured anew
    assert len(done) == 2 and done[1].overwrite


def test_measurement_is_in_run_json_and_changes_no_adapter(tmp_path):
    plain, measured = (
        execute(run_config(*SMALL, "dataset.train_size=16", f"results_dir={tmp_path / name}", *more))
        for name, more in (("plain", ()), ("measured", ("wandb.curvature_examples=2", "wandb.curvature_by_layer=true")))
    )
    curvature = measured.read()["init"]["curvature"]
    assert curvature["examples"] == 2 and curvature["largest_eigenvalue"] > 0
    assert curvature["converged"] and curvature["error"] <= 0.01 * curvature["largest_eigenvalue"]
    assert curvature["layers_not_converged"] == {}
    # a block on the diagonal has no larger eigenvalue than the whole matrix
    assert len(curvature["layers"]) == 21
    assert max(curvature["layers"].values()) <= 1.01 * curvature["largest_eigenvalue"]
    name = "adapter/adapter_model.safetensors"
    assert (plain.path / name).read_bytes() == (measured.path / name).read_bytes()
    assert "curvature" not in plain.read()["init"] and plain.read()["train"]["last_loss"] == pytest.approx(
        measured.read()["train"]["last_loss"], abs=0
    )


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--curvature", "0"], ("--curvature=0 is out of range", "at least 1")),
        (["--curvature", "-3"], ("--curvature=-3 is out of range",)),
        (["--curvature", "4", "--jobs", "2"], ("--jobs is not used with --curvature", "remove one of the two")),
        (["--curvature", "4", "--output", "here"], ("--output is not used with --curvature",)),
        (["--curvature", "4", "--dry-run"], ("--dry-run is not used with --curvature",)),
    ],
    ids=" ".join,
)
def test_options_that_it_does_not_read_are_refused(options, fragments, capsys):
    assert main([str(ROOT / "scripts/comparisons/scale_tiny.yaml"), *options]) == 2
    said = capsys.readouterr().err
    assert all(fragment in said for fragment in fragments) and said.count("\n") == 1


def test_nothing_measured_is_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    lost = ["--curvature", "2", "dataset.path=/nowhere", f"results_dir={tmp_path}"]
    assert main([str(ROOT / "scripts/comparisons/scale_tiny.yaml"), *lost]) == 1
    assert "not measured: " in capsys.readouterr().out


def test_doctests():
    assert doctest.testmod(comparison_curvature).failed == 0
