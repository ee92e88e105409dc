"""A sweep: what is finished is not redone, what fails stops nothing else, and its table is right."""

import csv
import json
import os
import signal
import sys
import weakref
from statistics import mean, stdev

import pytest

import run_exp
from lora_one.runs import cli, experiment
from lora_one.training.trainer import FineTuner

SWEEP = [
    "-m",
    "init=gradient,default",
    "model.learning_rate=1e-3,5e-3",
    "seed=1,2",
    "model.name=bundled/tiny",
    "dataset.train_size=24",
    "dataset.validation_size=8",
    "dataset.accuracy_examples=0",
    "model.real_batch_size=8",
    "model.per_device_batch_size=8",
    "wandb.mode=disabled",
]
STEPS, JOBS = 3, 8


def launched(monkeypatch, *arguments):
    monkeypatch.setenv("HYDRA_MAIN_MODULE", "__main__")  # conf/ lies beside run_exp.py, as when that is the program
    monkeypatch.setattr(sys, "argv", ["run_exp.py", *arguments])
    return cli.launch(run_exp.main)


def records(results):
    return [json.loads(file.read_text()) for file in results.rglob("run.json")]


@pytest.fixture
def jobs(monkeypatch):
    """Weak references to the models that jobs loaded, in their order."""
    models, original = [], experiment.load_base

    def remember(run, *encoder):
        assert not [model for model in models if model() is not None], "the last job's model is still in memory"
        base = original(run, *encoder)
        models.append(weakref.ref(base))
        return base

    monkeypatch.setattr(experiment, "load_base", remember)
    return models


def test_interrupted_half_way_a_sweep_runs_only_what_is_missing(tmp_path, monkeypatch, capsys, jobs):
    """2 initialisations x 2 learning rates x 2 seeds; SIGTERM comes in the fifth job."""
    original, losses = FineTuner.compute_loss, []

    def loss(*arguments, **options):
        losses.append(None)
        if len(losses) == 4 * STEPS + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(FineTuner, "compute_loss", loss)
    command = [*SWEEP, f"results_dir={tmp_path}"]
    assert launched(monkeypatch, *command) == 143
    assert sorted(record["status"] for record in records(tmp_path)) == ["finished"] * 4 + ["interrupted"]
    assert len(jobs) == 5 and not list(tmp_path.glob("sweep-*"))
    assert launched(monkeypatch, *command) == 0
    assert len(jobs) == 5 + 4 and len(losses) == JOBS * STEPS, "no step was taken twice"
    done = records(tmp_path)
    assert [record["status"] for record in done] == ["finished"] * JOBS

    printed = capsys.readouterr().out
    (table,) = tmp_path.glob("sweep-*.md")
    assert f"table: {table} and {table.stem}.csv" in printed and table.read_text() in printed
    with table.with_suffix(".csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 and {row["seeds"] for row in rows} == {"2"}
    for row in rows:
        of = [record for record in done if record["config_hash"].startswith(row["configuration"].rpartition("-")[2])]
        values = [record["evaluation"]["final"]["eval_loss"] for record in of]
        assert {record["config"]["seed"] for record in of} == {1, 2}
        assert float(row["val. loss"]) == pytest.approx(mean(values), rel=1e-12)
        assert float(row["val. loss sd"]) == pytest.approx(stdev(values), rel=1e-12)
        assert f"{mean(values):.4g} +- {stdev(values):.2g}" in table.read_text()


def test_failed_job_does_not_stop_others_and_is_not_in_the_table(tmp_path, monkeypatch, capsys, jobs):
    """The second learning rate makes the loss diverge."""
    command = [*SWEEP, "init=default", "model.learning_rate=1e-3,1e30", "model.max_grad_norm=0"]
    assert launched(monkeypatch, *command, f"results_dir={tmp_path}") == 1
    assert sorted(record["status"] for record in records(tmp_path)) == ["failed"] * 2 + ["finished"] * 2
    assert "the loss became nan" in capsys.readouterr().err
    (table,) = tmp_path.glob("sweep-*.md")
    assert len(table.read_text().splitlines()) == 3 and "lr0.001" in table.read_text()
