"""The time left of an evaluation counts only what this process generates now."""

import json
from types import SimpleNamespace

import pytest

from lora_one.distributed import Processes
from lora_one.evaluation import predictions
from lora_one.evaluation.decoding import Completion
from lora_one.evaluation.gsm8k import GSM8K, GSM8KOptions
from lora_one.evaluation.partial_results import PartialResults
from lora_one.progress import Progress
from lora_one.types import Example


class Numbers(GSM8K):
    def examples(self, options):
        return [Example(f"Q: {number}?", "", gold=str(number)) for number in range(10)]

    def completions(self, engine, examples, requests, done, options):
        for request in requests:
            yield request, Completion(f"#### {request[0]}")


@pytest.fixture
def no_engine(monkeypatch):
    """No model is loaded."""
    engine = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(predictions, "engine_class", lambda name: SimpleNamespace(start=lambda options: engine))


def test_saved_completions_are_done_before_the_clock_starts(tmp_path, monkeypatch, no_engine):
    options = GSM8KOptions(model_name="m")
    identity = {"model": "m", "settings": {}, "fingerprints": {}}
    partial = PartialResults(tmp_path / "partial.jsonl", identity, Processes(0, 1))
    for number in range(7):
        partial.add((number, 0), Completion("#### 0"))
    seen = []

    class Watched(Progress):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.append(self)

    monkeypatch.setattr("lora_one.progress.Progress", Watched)
    partial = PartialResults(partial.path, identity, Processes(0, 1))
    found = predictions.generated_predictions(Numbers(), Numbers().examples(options), options, partial)
    (shown,) = seen
    assert (shown.before, shown.done, shown.total) == (7, 10, 10) and len(found) == 10
    assert shown.facts["accuracy"] == "0.400", "0 of the saved ones, and 7, 8, 9"


@pytest.mark.parametrize(
    ("cut", "expected"),
    [([True, False, True], {"cut_off": 2}), ([False, False], {"cut_off": 0}), ([True, None], {}), ([None], {})],
)
def test_cut_completions_are_counted_if_all_are_known(cut, expected):
    """None: an engine does not say it, or a file of an earlier version. Prompts that fill the context are apart."""
    examples = [Example(f"Q: {number}?", "", gold="1") for number in range(len(cut) + 1)]
    completions = [Completion("#### 1", cut_off=known) for known in cut] + [Completion("", too_long=True)]
    lines = [predictions.prediction_of(GSM8K(), *both) for both in zip(examples, range(9), completions, strict=False)]
    assert [line.get("cut_off") for line in lines] == [*cut, None]
    assert predictions.remarks_of(GSM8K(), lines) == {"too_long": 1} | expected


def test_partial_results_of_an_earlier_version_are_continued(tmp_path, no_engine):
    """Their lines end before the field cut_off."""
    options, identity = GSM8KOptions(model_name="m"), {"model": "m", "settings": {}, "fingerprints": {}}
    path = tmp_path / "partial.jsonl"
    path.write_text(json.dumps(identity) + "\n" + json.dumps([0, 0, "#### 0", False, {}, 7]) + "\n")
    partial = PartialResults(path, identity, Processes(0, 1))
    partial.add((1, 0), Completion("#### 1", cut_off=False))
    assert partial.read(overwrite=False)[1, 0] == Completion("#### 1", cut_off=False)
    partial = PartialResults(path, identity, Processes(0, 1))
    found = predictions.generated_predictions(Numbers(), Numbers().examples(options), options, partial)
    assert (found[0]["room"], found[0].get("cut_off"), found[1]["cut_off"]) == (7, None, False)
    assert len(found) == 10 and "cut_off" not in predictions.remarks_of(GSM8K(), found)


def test_rescoring_compares_every_answer_of_a_line_with_the_gold_answer_of_now(tmp_path):
    other = {"prediction_first_token": "8", "correct_first_token": True}  # of a wrong gold answer, since corrected
    line = {"id": 0, "prompt": "p", "completion": "#### 7", "gold": "7", "prediction": "7", "correct": False} | other
    found = predictions.rescored(GSM8K(), tmp_path, 1, json.dumps(line))
    assert (found["correct"], found["correct_first_token"]) == (True, False)
