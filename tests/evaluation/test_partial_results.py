"""Saved completions of an unfinished evaluation, after a disk was full."""

import os
from pathlib import Path

import pytest

from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.evaluation.decoding import Completion
from lora_one.evaluation.partial_results import PartialResults

FIRST, SECOND = (0, 0), (1, 0)


def saved(folder):
    return PartialResults(
        folder / "predictions.partial.jsonl", {"model": "tiny", "settings": {}, "fingerprints": {}}, Processes()
    )


@pytest.mark.parametrize("kept", [0, 5, 40])
def test_an_incomplete_line_is_left_out_also_if_it_is_the_first(kept, tmp_path):
    partial = saved(tmp_path)
    partial.add(FIRST, Completion("four"))
    text = partial.path.read_text()
    partial.path.write_text(text[:kept])  # as much as the disk had room for
    assert saved(tmp_path).read(overwrite=False) == {}
    for request, answer in ((FIRST, "four"), (SECOND, "six")):
        saved(tmp_path).add(request, Completion(answer))
    assert saved(tmp_path).read(overwrite=False) == {FIRST: Completion("four"), SECOND: Completion("six")}


def test_an_interrupted_replacement_of_finished_results_continues(tmp_path):
    finished = tmp_path / "metrics.json"
    saved(tmp_path).add(FIRST, Completion("of a run that was given up"))
    assert saved(tmp_path).read(overwrite=True) == {}  # nothing has finished
    saved(tmp_path).add(FIRST, Completion("older"))
    finished.write_text("{}")
    os.utime(saved(tmp_path).path, (1, 1))
    assert saved(tmp_path).read(overwrite=True) == {}
    saved(tmp_path).add(FIRST, Completion("newer"))
    os.utime(finished, (1, 1))
    assert saved(tmp_path).read(overwrite=True) == {FIRST: Completion("newer")}
    other = PartialResults(saved(tmp_path).path, saved(tmp_path).identity | {"model": "small"}, Processes())
    assert other.read(overwrite=True) == {}


def test_a_full_disk_is_reported_with_a_remedy(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunError, match=r"cannot be written \(No space left on device\): free disk space"):
        saved(tmp_path).add(FIRST, Completion("four"))
