"""Fixtures of wrong inputs: broken files, and run_exp.py as a program in this process."""

import logging
import runpy
import sys
from pathlib import Path

import pytest

from lora_one import models
from scripts.campaign.forked import Forking
from tests.helpers.bad_input import broken_files
from tests.helpers.paths import ROOT


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The folder of broken data and models."""
    return broken_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def program(tmp_path, monkeypatch, capfd, files):
    """Run run_exp.py: exit code, the lines of stderr, and what was left in the results folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # datasets logs to the stderr of an earlier test, now closed

    def run(line: str, *defaults: str) -> tuple[int, list[str], list[Path]]:
        results = tmp_path / "results"
        arguments = [argument.replace("{files}", str(files)) for argument in line.split(" ")]
        given = {argument.partition("=")[0] for argument in arguments}
        defaults = [argument for argument in defaults if argument.partition("=")[0] not in given]
        own = ["wandb.mode=disabled"] + ([] if "results_dir" in given else [f"results_dir={results}"])
        monkeypatch.setattr(sys, "argv", ["run_exp.py", *arguments, *own, *defaults])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "run_exp.py"), run_name="__main__")
        said = capfd.readouterr().err.splitlines()
        return stop.value.code, said, sorted(tmp_path.rglob("*"))

    return run


@pytest.fixture
def no_weights(monkeypatch):
    def load_model(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_model", load_model)
    cpu = models.device("cpu")
    monkeypatch.setattr("lora_one.models.requirements.device", lambda wanted=None: cpu)


@pytest.fixture(scope="module")
def forking():
    """Starts several processes of a command, see scripts/campaign/forked.py."""
    with Forking() as start:
        yield start
