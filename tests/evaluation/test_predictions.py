"""The time left of an evaluation counts only what this process generates now."""

from lora_one.distributed import Processes
from lora_one.evaluation import predictions
from lora_one.evaluation.generate import Completion
from lora_one.evaluation.gsm8k import GSM8K, GSM8KOptions
from lora_one.evaluation.partial_results import PartialResults
from lora_one.progress import Progress
from lora_one.types import Example


class Numbers(GSM8K):
    def examples(self, options):
        return [Example(f"Q: {number}?", "", gold=str(number)) for number in range(10)]

    def completions(self, examples, requests, done, options):
        for request in requests:
            yield request, Completion(f"#### {request[0]}")


def test_saved_completions_are_done_before_the_clock_starts(tmp_path, monkeypatch):
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
    found = predictions.generated_predictions(
        Numbers(), options, PartialResults(partial.path, identity, Processes(0, 1))
    )
    (shown,) = seen
    assert (shown.before, shown.done, shown.total) == (7, 10, 10) and len(found) == 10
    assert shown.facts["accuracy"] == "0.400", "0 of the saved ones, and 7, 8, 9"
