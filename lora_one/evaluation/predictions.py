"""Predictions of an evaluation: scores of generated or of saved completions."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_one.errors import UsageError
from lora_one.evaluation.benchmark import Benchmark, Prediction, Request
from lora_one.evaluation.decoding import Completion
from lora_one.evaluation.engines import engine_class
from lora_one.evaluation.options import EvaluationOptions
from lora_one.evaluation.partial_results import PartialResults
from lora_one.progress import Progress, progress
from lora_one.types import Example

if TYPE_CHECKING:
    from lora_one.evaluation.engines.protocol import Engine


@dataclass
class ScoredCompletions:
    """Scores completions one by one; ``shown``: the progress, with the accuracy so far."""

    benchmark: Benchmark[Any]
    examples: Sequence[Example]
    shown: Progress
    predictions: dict[Request, Prediction] = field(default_factory=dict)
    too_long: int = 0
    correct: int = 0

    def add(self, request: Request, completion: Completion, *, generated_here: bool = True) -> None:
        """Score a completion and keep the prediction. generated_here: not saved earlier or by another process."""
        line = prediction_of(self.benchmark, self.examples[request[0]], request[0], completion)
        self.predictions[request] = line
        self.too_long += completion.too_long
        scored = line.get("correct") is not None
        self.correct += scored and line["correct"]
        if scored:
            self.shown.facts["accuracy"] = f"{self.correct / len(self.predictions):.3f}"
        if generated_here:
            self.shown.advance()


def prediction_of(benchmark: Benchmark[Any], example: Example, index: int, completion: Completion) -> Prediction:
    """Return the line of predictions.jsonl: the benchmark's score, then the facts about the completion."""
    number = index if example.id is None else example.id
    line = benchmark.score(number, example.prompt, completion.text, example.gold) | completion.details
    line |= {"too_long": True} if completion.too_long else {}
    known = {"room": completion.room, "cut_off": completion.cut_off}
    return line | {name: value for name, value in known.items() if value is not None}


def requests_of(examples: Sequence[Example], options: EvaluationOptions) -> list[Request]:
    """Return all completions that an evaluation needs: the samples of an example together."""
    return [(index, sample) for index in range(len(examples)) for sample in range(options.num_sample)]


def generated_predictions(
    benchmark: Benchmark[Any],
    examples: Sequence[Example],
    options: EvaluationOptions,
    partial: PartialResults,
    begin: "Callable[[Engine], Engine] | None" = None,
) -> list[Prediction]:
    """Generate the completions that are not saved yet, score all, and return the predictions.

    They are in the order of the data, the samples of an example together. With several processes, each one generates
    its share; the first process returns all predictions, the others return none.
    begin: called with the engine before the first of these completions; it returns the engine to use.
    """
    requests = requests_of(examples, options)
    done = partial.read(overwrite=options.overwrite)
    processes = partial.processes
    asked = [request for request in requests if request not in done]
    own = math.ceil(len(asked) / processes.count)
    with progress("evaluation", len(done) + own, benchmark.counted, len(done)) as shown:
        scored = ScoredCompletions(benchmark, examples, shown)
        for request, completion in done.items():
            scored.add(request, completion, generated_here=False)
        if asked:
            with closing(engine_class(options.engine).start(options)) as engine:
                used = engine if begin is None else begin(engine)
                for request, completion in benchmark.completions(used, examples, asked, done, options):
                    partial.add(request, completion)
                    scored.add(request, completion)
        processes.meet()
        if processes.rank > 0:
            return []
        for request, completion in {} if processes.count == 1 else partial.gathered().items():
            if request not in scored.predictions:
                scored.add(request, completion, generated_here=False)
    if scored.too_long:
        print(
            f"warning: {scored.too_long} completions are empty, because their prompts fill the model's context",
            file=sys.stderr,
        )
    return [scored.predictions[request] for request in requests]


def rescored_predictions(benchmark: Benchmark[Any], file: Path) -> list[Prediction]:
    """Score the completions of a predictions.jsonl again. Raises UsageError: a line is not a prediction."""
    try:
        lines = file.read_text().rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"--rescore={file} is not a text file: pass the predictions.jsonl of an evaluation") from error
    return [rescored(benchmark, file, number, text) for number, text in enumerate(lines, start=1)]


def settings_beside(predictions: str) -> dict[str, Any]:
    """Return the settings of the evaluation that wrote a predictions.jsonl; {}: they are not known."""
    try:
        report = json.loads((Path(predictions).parent / "metrics.json").read_text())
        return report.get("settings_of_completions", {}) | report["settings"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def rescored(benchmark: Benchmark[Any], file: Path, number: int, text: str) -> Prediction:
    """Score one line again. Raises UsageError: the line is not a prediction."""
    try:
        line = json.loads(text)
        for name, kinds in (("id", str | int), ("prompt", str), ("completion", str), ("gold", object)):
            if name not in line:
                raise ValueError(f"it has no {name}")
            if not isinstance(line[name], kinds):
                raise TypeError(f"{name} is {line[name]!r:.40}")
        kinds = [name.removeprefix("prediction_") for name in line if name.startswith("prediction_")]
        others = {f"correct_{kind}": line[f"prediction_{kind}"] == line["gold"] for kind in kinds}
        return line | others | benchmark.score(line["id"], line["prompt"], line["completion"], line["gold"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"unknown: {error}" if isinstance(error, KeyError) else error
        raise UsageError(
            f"--rescore={file}, line {number} is not a prediction of this benchmark ({reason}); required are id, "
            "prompt, completion, gold: pass the predictions.jsonl of an evaluation"
        ) from error


def remarks_of(benchmark: Benchmark[Any], predictions: Sequence[Prediction]) -> dict[str, int]:
    """Return the counts of prompts that fill the context or leave less room than max_new_tokens, if there are any.

    cut_off: of completions that the limit of new tokens ended, if this is known of all of them. The benchmark's remarks
    are added.
    """
    found = {
        "too_long": sum("too_long" in line for line in predictions),
        "cut_to_context": sum("room" in line for line in predictions),
    }
    found = {name: count for name, count in found.items() if count}
    generated = [line for line in predictions if "too_long" not in line]
    if generated and all("cut_off" in line for line in generated):
        found["cut_off"] = sum(line["cut_off"] for line in generated)
    return found | benchmark.remarks(predictions)
