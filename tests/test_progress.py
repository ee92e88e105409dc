"""Progress: nothing for short stages, few lines off a terminal, a bar on one, only on the first process."""

import doctest
import io
import itertools
import re

import pytest

from lora_one import progress as module
from lora_one.progress import EVERY, QUIET, progress


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which the tests set."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def lines(capsys):
    captured = capsys.readouterr()
    assert captured.out == "", "stdout belongs to results"
    return captured.err.splitlines()


def run(clock, parts, seconds, **options):
    """A stage whose parts take this many seconds each."""
    with progress("gradient", parts, "batches", **options) as shown:
        for _ in range(parts - options.get("done", 0)):
            clock[0] += seconds
            shown.advance()


def test_a_short_stage_prints_nothing(clock, capsys):
    run(clock, 10, QUIET / 11)
    assert lines(capsys) == []


def test_lines_have_a_share_and_times_and_keep_their_distance(clock, capsys):
    run(clock, 100, 1.0)
    *shown, last = lines(capsys)
    assert shown[0] == "gradient: 2 of 100 batches (2 %), 0:02 elapsed, about 1:38 left"
    at = [int(re.search(r"(\d+) of", line)[1]) for line in shown]
    assert min(b - a for a, b in itertools.pairwise(at)) >= EVERY and len(at) == 10
    assert last == "gradient: 100 batches in 1:40"


def test_in_a_long_stage_lines_become_rarer(clock, capsys):
    run(clock, 10 * 3600, 1.0)
    assert len(lines(capsys)) < 600


def test_what_was_done_before_does_not_shorten_the_estimate(clock, capsys):
    run(clock, 100, 10.0, done=90)
    assert lines(capsys)[:2] == [
        "gradient: 91 of 100 batches (91 %), 0:10 elapsed",  # it may be the first one of a batch
        "gradient: 92 of 100 batches (92 %), 0:20 elapsed, about 1:20 left",
    ]


def test_a_batch_counts_when_it_has_ended(clock, capsys):
    """16 parts end together every 16 s: 1 s each, not 16 s as it looks after the first one."""
    with progress("evaluation", 160, "completions") as shown:
        for _ in range(10):
            clock[0] += 16
            for _ in range(16):
                shown.advance()
    assert lines(capsys)[1] == "evaluation: 16 of 160 completions (10 %), 0:16 elapsed, about 2:24 left"


def test_facts_stay_and_more_parts_than_expected_are_no_error(clock, capsys):
    with progress("search", 3, "losses") as shown:
        for place in range(4):
            clock[0] += 20
            shown.advance(**{"loss": "1.5"} if place == 0 else {})
    assert lines(capsys)[1].endswith("left, loss 1.5") and shown.total == 4


@pytest.mark.parametrize(
    ("variables", "prints"),
    [
        ({"RANK": "1"}, False),
        ({"RANK": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, False),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "1"}, True),
    ],
)
def test_of_several_processes_only_the_first_prints(variables, prints, clock, capsys, monkeypatch):
    """Those of torchrun, and the tasks of srun before RANK is derived from them."""
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run(clock, 100, 1.0)
    assert bool(lines(capsys)) == prints


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("seconds", "appears"), [(0.0, False), (0.02, True)])
def test_on_a_terminal_a_bar_appears_after_a_while_and_goes(monkeypatch, seconds, appears):
    import time

    monkeypatch.setattr(module.sys, "stderr", Terminal())
    monkeypatch.setattr(module, "QUIET", 0.05)
    with progress("gradient", 20, "batches") as shown:
        for _ in range(20):
            time.sleep(seconds)
            shown.advance(loss="1.5")
    written = module.sys.stderr.getvalue()
    assert ("gradient:" in written and "loss=1.5" in written) == appears
    assert re.split(r"[\r\n]", written)[-1].strip() == ""


def test_a_stage_that_fails_is_not_said_to_have_ended(clock, capsys):
    with pytest.raises(KeyError), progress("gradient", 20, "batches") as shown:
        for _ in range(2):
            clock[0] += 20
            shown.advance()
        raise KeyError
    assert len(lines(capsys)) == 2


def test_a_stage_that_fails_closes_its_bar(monkeypatch):
    monkeypatch.setattr(module.sys, "stderr", Terminal())
    with pytest.raises(KeyError), progress("gradient", 20, "batches") as shown:
        raise KeyError
    assert shown.bar.disable


def test_doctests():
    assert doctest.testmod(module).failed == 0
