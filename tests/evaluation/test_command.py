"""Errors of an evaluation: one line and an exit code, from one of several processes."""

import pytest
from torch import distributed as dist

from lora_one import peers
from lora_one.errors import RunError, UsageError
from lora_one.evaluation.command import exit_code


@pytest.fixture
def two(monkeypatch):
    """The signs of life of two processes; the first one is that of the tests."""
    store = dist.HashStore()
    both = [peers.Peers(store, rank, 2, silence_s=8.0) for rank in range(2)]
    monkeypatch.setattr(peers, "_peers", [both[1]])
    monkeypatch.setattr(peers.Peers, "pause", lambda self, _: setattr(self, "ticks", self.ticks + 1))
    both[0].beat()
    return both


def failing(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(("error", "code"), [(UsageError("no"), 2), (RunError("no"), 1), (KeyboardInterrupt(), 130)])
def test_an_error_of_all_processes_is_printed_once(error, code, two, capsys, monkeypatch):
    assert exit_code(failing(error)) == code
    assert capsys.readouterr().err.startswith("error: ")
    assert two[1].word == peers.FAILED, "the other process ends, too"
    monkeypatch.setattr(peers, "_peers", [two[0]])
    two[1].farewell(peers.FAILED)
    assert exit_code(failing(error)) == code
    assert capsys.readouterr().err == ""


def test_a_lost_process_is_named(two, capsys):
    assert exit_code(failing(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: process 0 (pid ") and "gave no sign of life" in line


def test_a_full_disk_is_one_line_and_another_error_a_traceback(capsys):
    assert exit_code(failing(OSError(28, "No space left on device", "predictions.jsonl"))) == 1
    assert capsys.readouterr().err.startswith("error: predictions.jsonl cannot be written (No space left on device)")
    with pytest.raises(RuntimeError, match="a bug"):
        exit_code(failing(RuntimeError("a bug")))
