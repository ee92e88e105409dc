"""A run prints its own lines only; what libraries warn of still appears."""

import logging
import os
import re
import subprocess
import sys

import pytest
from transformers.utils import logging as transformers_logging

from lora_one.models import load_model
from lora_one.quiet import NOISE, quiet_weights
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL

OWN_PROGRESS = re.compile(
    r"step \d+ of \d+: validation loss [\d.]+, exact match [\d.]+|[a-z, ]+: \d+ (of \d+ )?[a-z]+ .*\d:\d\d.*"
)


@pytest.mark.parametrize("name", NOISE)
def test_only_the_noise_of_a_logger_is_dropped(name):
    def passes(message, *arguments):
        logger = logging.getLogger(name)
        return bool(logger.filter(logger.makeRecord(name, logging.WARNING, "file", 1, message, arguments, None)))

    assert not passes(NOISE[name] + " from somewhere: %s", "a reason")
    assert passes("a weight is not finite")


def test_bars_of_weights_are_hidden_and_others_come_back(capfd):
    load_model("bundled/tiny")
    assert capfd.readouterr().err == ""
    with quiet_weights():
        list(transformers_logging.tqdm(range(2)))
    assert capfd.readouterr().err == ""
    list(transformers_logging.tqdm(range(2)))
    assert "2/2" in capfd.readouterr().err


@pytest.mark.slow
def test_commands_print_no_noise(tmp_path):
    """A run with W&B as by default and its merge: on stderr only the lines of their own progress, nowhere a bar."""
    results = [*SMALL[1:], "dataset.accuracy_examples=4", f"results_dir={tmp_path}"]
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_MODE"}

    def said(*command):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert all(OWN_PROGRESS.match(line) for line in done.stderr.split("\n")[:-1]), done.stderr
        assert "\r" not in done.stdout
        return done.stdout

    lines = said("run_exp.py", "-m", "init=lora_one,lora", *results).splitlines()
    runs = [line.removeprefix("run: ").removesuffix("/run.json") for line in lines if line.startswith("run: ")]
    assert len(runs) == 2
    assert "merged: " in said("scripts/merge.py", runs[0])
