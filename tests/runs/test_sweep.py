"""A sweep: what is finished is not redone, what fails stops nothing else, and its table is right."""

import csv
import dataclasses
import gc
import hashlib
import json
import math
import os
import re
import signal
import sys
import weakref
from collections import Counter
from statistics import mean, stdev
from typing import ClassVar

import pytest
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

import run_exp
from lora_one import files
from lora_one.config.defaults import configuration_folder
from lora_one.models import BUNDLED
from lora_one.records.folder import RunFolder, locate
from lora_one.runs import cli, experiment
from lora_one.runs.sweep import Sweep
from lora_one.training.trainer import FineTuner
from tests.helpers.runs import run_config

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
    said = capsys.readouterr()
    assert re.findall(r"job (\d) of 8: (.*) \((\d) left", said.out)[2:4] == [
        ("3", "init=gradient, model.learning_rate=0.005, seed 1", "6"),
        ("4", "init=gradient, model.learning_rate=0.005, seed 2", "5"),
    ]
    assert re.search(r"\(5 left, about 0:\d\d\)", said.out), "from the jobs before it"
    listed = said.err.partition("finished, 4 of 8 jobs:\n")[2].partition("left, 4 of 8 jobs:\n")
    assert "job 4: init=gradient, model.learning_rate=0.005, seed 2" in listed[0]
    assert listed[2].splitlines()[0] == "  job 5: init=default, model.learning_rate=0.001, seed 1"
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
    assert [(row["init"], row["model.learning_rate"]) for row in rows] == [
        (init, rate) for init in ("gradient", "default") for rate in ("0.001", "0.005")
    ]
    for row in rows:
        of = [record for record in done if record["config_hash"].startswith(row["configuration"].rpartition("-")[2])]
        values = [record["evaluation"]["final"]["eval_loss"] for record in of]
        assert {record["config"]["seed"] for record in of} == {1, 2}
        assert float(row["val. loss"]) == pytest.approx(mean(values), rel=1e-12)
        assert float(row["val. loss sd"]) == pytest.approx(stdev(values), rel=1e-12)
        assert f"{mean(values):.4f} +- {stdev(values):.4f}" in table.read_text()


def test_failed_job_does_not_stop_others_and_has_a_row_with_its_reason(tmp_path, monkeypatch, capsys, jobs):
    """The second learning rate makes the loss diverge."""
    command = [*SWEEP, "init=default", "model.learning_rate=1e-3,1e30", "model.max_grad_norm=0"]
    assert launched(monkeypatch, *command, f"results_dir={tmp_path}") == 1
    assert sorted(record["status"] for record in records(tmp_path)) == ["failed"] * 2 + ["finished"] * 2
    assert "the loss became nan" in capsys.readouterr().err
    (table,) = tmp_path.glob("sweep-*.md")
    with table.with_suffix(".csv").open() as stream:
        rows = [(row["model.learning_rate"], row["seeds"], row["note"]) for row in csv.DictReader(stream)]
    assert rows[0] == ("0.001", "2", "")
    for seed, (rate, seeds, note) in zip("12", rows[1:], strict=True):
        assert (float(rate), seeds) == (1e30, "0") and note.startswith(f"seed {seed}: failed: the loss became nan")
        assert note in table.read_text()


def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch, capsys):
    def full(run):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(experiment, "execute", full)
    assert launched(monkeypatch, f"results_dir={tmp_path}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: a file cannot be written (No space left on device): free disk space, and repeat the command"


def test_a_job_without_result_or_error_has_a_row(tmp_path, capsys):
    sweep = Sweep()
    sweep.plan([{"init": "lora", "seed": "1"}, {"init": "svd", "seed": "1"}], several=True)
    folder = RunFolder(tmp_path / "project" / "lora-12345678" / "1")
    folder.update(config={"wandb": {"mode": "disabled"}}, train={"seconds": 2.0})
    with sweep.job():
        sweep.add(folder)
    sweep.close()
    (table,) = tmp_path.glob("sweep-*.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["init"], row["train s"], row["note"]) for row in rows] == [
        ("lora", "2.0", ""),
        ("svd", "", "seed 1: not run"),
    ]


def test_ctrl_c_ends_a_sweep_and_lists_its_jobs(tmp_path, monkeypatch, capsys):
    original = FineTuner.compute_loss

    def loss(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(FineTuner, "compute_loss", original)
        return original(*arguments, **options)

    monkeypatch.setattr(FineTuner, "compute_loss", loss)
    command = [*SWEEP, "init=default", "model.learning_rate=1e-3", f"results_dir={tmp_path}"]
    assert launched(monkeypatch, *command) == 130
    said = capsys.readouterr().err
    assert "left, 2 of 2 jobs:" in said and "finished," not in said
    assert [record["status"] for record in records(tmp_path)] == ["interrupted"]
    assert list(tmp_path.rglob("checkpoint-1"))


def test_a_single_run_is_not_numbered(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "execute", lambda run: None)
    assert launched(monkeypatch, f"results_dir={tmp_path}") == 0
    assert "job" not in capsys.readouterr().out


@pytest.fixture
def executed(monkeypatch):
    """The configurations of the jobs, which are not run."""
    runs = []
    monkeypatch.setattr(experiment, "execute", runs.append)
    return runs


def test_the_names_of_shuffled_jobs_are_those_of_their_runs(tmp_path, monkeypatch, capsys, executed):
    """Hydra draws the order when it starts, so the jobs are not known in advance."""
    rates = [f"{rate}e-4" for rate in range(1, 10)]
    assert (
        launched(monkeypatch, "-m", f"model.learning_rate=shuffle({','.join(rates)})", f"results_dir={tmp_path}") == 0
    )
    said = re.findall(r"job (\d): (?:model.learning_rate=(\S+), )?seed 42\n", capsys.readouterr().out)
    assert [int(number) for number, _ in said] == list(range(1, 10))
    assert [float(rate) for _, rate in said[1:]] == [run.model.learning_rate for run in executed[1:]]


def test_a_glob_is_named_job_by_job(tmp_path, monkeypatch, capsys, executed):
    assert launched(monkeypatch, "-m", "optimizer=glob(s*)", f"results_dir={tmp_path}") == 0
    said = capsys.readouterr().out
    assert len(executed) == 3 and "job 2: optimizer=scaled_gd, seed 42" in said and " of " not in said


def test_a_sweep_of_an_experiment_file_replaces_the_plan(tmp_path, monkeypatch, capsys, executed):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/four.yaml").write_text(
        "# @package _global_\nhydra: {sweeper: {params: {seed: '5,6'}}}\n"
    )
    arguments = ["--config-dir", str(tmp_path / "mine"), "experiment=four", "init=lora,pissa", "-m"]
    assert launched(monkeypatch, *arguments, f"results_dir={tmp_path}") == 0
    found = sorted((run.init.title, run.seed) for run in executed)
    assert found == [("LoRA", 5), ("LoRA", 6), ("pissa", 5), ("pissa", 6)]
    assert "of 2" not in capsys.readouterr().out


class Returned(Callback):
    """A callback of Hydra that keeps what the jobs return."""

    values: ClassVar[list] = []

    def on_job_end(self, config, job_return, **_):
        self.values.append(job_return.return_value)


def test_a_sweeper_gets_the_validation_loss_of_each_job(tmp_path, monkeypatch):
    command = [*SWEEP, "init=default", "seed=1", "model.learning_rate=1e-3,1e30", "model.max_grad_norm=0"]
    callback = f"+hydra.callbacks.returned._target_={__name__}.Returned"
    assert launched(monkeypatch, *command, callback, f"results_dir={tmp_path}") == 1
    finished = next(record for record in records(tmp_path) if record["status"] == "finished")
    assert Returned.values == [finished["evaluation"]["final"]["eval_loss"], math.inf], "the second one diverges"


def test_a_finished_job_is_skipped_without_hashing_collecting_or_composing_again(tmp_path, monkeypatch, capsys):
    """What a job costs does not depend on the number of jobs."""
    seeds = range(6)
    run = run_config(*[part for part in SWEEP[4:] if "bundled" not in part], "init=default", f"results_dir={tmp_path}")
    for seed in seeds:
        located = locate(dataclasses.replace(run, seed=seed))
        final = {"evaluation": {"final": {"eval_loss": 1.0 + seed}}}
        located.folder.update(status="finished", config=located.run.published(), **final)
    counts, read, digest, load = Counter(), RunFolder.read, hashlib.file_digest, OmegaConf.load
    monkeypatch.setattr(files, "_digests", {})
    monkeypatch.setattr(files, "RECENT", 0)
    monkeypatch.setattr(RunFolder, "read", lambda self: counts.update(["read"]) or read(self))
    monkeypatch.setattr(hashlib, "file_digest", lambda *file: counts.update(["hashed"]) or digest(*file))
    monkeypatch.setattr(OmegaConf, "load", lambda file: counts.update([file.name]) or load(file))
    monkeypatch.setattr(gc, "collect", lambda *_: counts.update(["collected"]))
    command = ["-m", f"seed={','.join(map(str, seeds))}", *SWEEP[4:], "init=default", f"results_dir={tmp_path}"]
    assert launched(monkeypatch, *command) == 0
    assert capsys.readouterr().out.count("already finished") == len(seeds)
    assert counts["read"] == 3 * len(seeds), "whether it is finished, its loss for a sweeper, its row in the table"
    assert counts["hashed"] == len([file for file in BUNDLED.joinpath("tiny").iterdir() if file.is_file()])
    assert counts[str(configuration_folder() / "init" / "default.yaml")] == 3, "by Hydra twice at the start, then once"
    assert not counts["collected"]


def test_a_job_that_was_only_checked_is_left(capsys):
    sweep = Sweep()
    sweep.plan([{"seed": "1"}, {"seed": "2"}], several=True)
    for number in range(2):
        with sweep.job(number, checked_only=True):
            pass
    with sweep.job(0):
        pass
    sweep.print_state()
    assert capsys.readouterr().err.splitlines() == [
        "finished, 1 of 2 jobs:", "  job 1: seed 1", "left, 1 of 2 jobs:", "  job 2: seed 2"
    ]  # fmt: skip
