"""What a benchmark is: its options, its examples, how a completion is scored, how scores are summarized."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from lora_one.evaluation.decoding import Completion, Decoding
from lora_one.evaluation.options import EvaluationOptions
from lora_one.statistics.units import Unit
from lora_one.types import Example

if TYPE_CHECKING:
    from lora_one.evaluation.engines.protocol import Engine

Request = tuple[int, int]  # (index of the example, number of its sample)
Prediction = dict[str, Any]  # one line of predictions.jsonl
Options = TypeVar("Options", bound=EvaluationOptions)


class Benchmark(ABC, Generic[Options]):
    """A benchmark; it has no state. ``examples``, ``score`` and ``summarize`` are required, the rest has defaults.

    options: the class of its options: EvaluationOptions, or a frozen subclass with more fields.
    counted: what the progress of an evaluation counts.
    units: metric -> its unit, of metrics that are not shares of correct answers.
    """

    options: ClassVar[type[EvaluationOptions]] = EvaluationOptions
    counted: ClassVar[str] = "completions"
    units: ClassVar[Mapping[str, Unit]] = {}

    @abstractmethod
    def examples(self, options: Options) -> Sequence[Example]:
        """Return all examples; ``score`` gets their ``gold``. Raises UsageError, RunError: the data cannot be used."""

    @abstractmethod
    def score(self, example_id: Any, prompt: str, completion: str, gold: Any) -> Prediction:
        """Return one line of predictions.jsonl: the fields of ``scoring.prediction_line``, possibly more.

        A benchmark without answers returns only the id; the other fields are details of its completions.

        Raises ValueError, KeyError, TypeError or AttributeError: not an id or gold answer of this benchmark.
        """

    @abstractmethod
    def summarize(self, predictions: Sequence[Prediction]) -> tuple[dict[str, float], dict[str, int]]:
        """Return (metrics, counts); each metric is followed by its standard error as ``<metric>_stderr``."""

    def add_spellings(self, parser: argparse.ArgumentParser) -> None:
        """Add the published names of options that have another name here."""

    def check(self, options: Options) -> Options:
        """Check the options; return them with the fields set by the benchmark. Raises UsageError, RunError."""
        return options

    def folder(self, task: str, options: Options) -> str:
        """Return the name of the results folder below ``eval/``."""
        return task

    def limited_examples(self, options: Options) -> Sequence[Example]:
        """Return the first --limit examples."""
        return self.examples(options)[: options.limit]

    def needs_model(self, options: Options) -> str | None:
        """Return what needs the model itself in this process, in words; None: any engine can be used."""
        return None

    def takes_template(self, options: Options) -> bool:
        """Return whether all answers are texts that can follow a turn of the user in a chat template."""
        return True

    def completions(
        self,
        engine: "Engine",
        examples: Sequence[Example],
        requests: Sequence[Request],
        done: Collection[Request],
        options: Options,
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield a completion for each request, in any order. ``done``: requests that already have one."""
        prompts = engine.encoder.prompts(examples)
        sampling = (options.temperature, options.top_p, options.seed)
        decoding = Decoding(options.max_new_tokens, *sampling, stop=options.stop)
        asked = [prompts[index] for index, _ in requests]
        streams = [f"{index}:{sample}" for index, sample in requests]
        for position, completion in engine.generate(asked, decoding, streams):
            yield requests[position], completion

    def judge(self, predictions: Sequence[Prediction], options: Options, output: Path) -> Sequence[Prediction]:
        """Return the predictions with ``correct`` filled in, if ``score`` has left it None."""
        return predictions

    def remarks(self, predictions: Sequence[Prediction]) -> dict[str, int]:
        """Return further counts for metrics.json."""
        return {}


class AnswerBenchmark(Benchmark[Options]):
    """A benchmark whose answers are not only generated text, but likelihoods or the output of a head as well."""

    counted: ClassVar[str] = "examples"

    @abstractmethod
    def answers(
        self, engine: "Engine", examples: Sequence[Any], options: Options, done: Collection[int]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) of each example that is not in ``done``, the indices that already have one."""

    def completions(
        self,
        engine: "Engine",
        examples: Sequence[Example],
        requests: Sequence[Request],
        done: Collection[Request],
        options: Options,
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield the answers; each example has one."""
        for index, completion in self.answers(engine, examples, options, {index for index, _ in done}):
            yield (index, 0), completion
