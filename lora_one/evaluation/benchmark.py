"""What a benchmark is: its options, its examples, how a completion is scored, how scores are summarized."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from lora_one.evaluation.options import EvaluationOptions
from lora_one.statistics.units import Unit
from lora_one.types import Example

if TYPE_CHECKING:
    from lora_one.evaluation.generate import Completion
    from lora_one.evaluation.loading import LoadedModel

Request = tuple[int, int]  # (index of the example, number of its sample)
Prediction = dict[str, Any]  # one line of predictions.jsonl
Options = TypeVar("Options", bound=EvaluationOptions)


class Benchmark(ABC, Generic[Options]):
    """A benchmark; it has no state. ``examples``, ``score`` and ``summarize`` are required, the rest has defaults.

    options: the class of its options: EvaluationOptions, or a frozen subclass with more fields.
    units: metric -> its unit, of metrics that are not shares of correct answers.
    """

    options: ClassVar[type[EvaluationOptions]] = EvaluationOptions
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

    def completions(
        self, examples: Sequence[Example], requests: Sequence[Request], done: Collection[Request], options: Options
    ) -> Iterator[tuple[Request, "Completion"]]:
        """Yield a completion for each request, in any order. ``done``: requests that already have one."""
        from lora_one.evaluation import engines

        return engines.generated(examples, requests, options)

    def judge(self, predictions: Sequence[Prediction], options: Options, output: Path) -> Sequence[Prediction]:
        """Return the predictions with ``correct`` filled in, if ``score`` has left it None."""
        return predictions

    def remarks(self, predictions: Sequence[Prediction]) -> dict[str, int]:
        """Return further counts for metrics.json."""
        return {}


class ModelBenchmark(Benchmark[Options]):
    """A benchmark that needs the model itself, for likelihoods or a head, not only an engine that generates text."""

    @abstractmethod
    def answers(
        self, loaded: "LoadedModel", examples: Sequence[Any], options: Options, done: Collection[int]
    ) -> Iterator[tuple[int, "Completion"]]:
        """Yield (index, completion) of each example that is not in ``done``, the indices that already have one."""

    def completions(
        self, examples: Sequence[Example], requests: Sequence[Request], done: Collection[Request], options: Options
    ) -> Iterator[tuple[Request, "Completion"]]:
        """Yield the answers of the model; it is loaded only if there are requests."""
        from lora_one.evaluation import loading

        if requests:
            known = {index for index, _ in done}
            for index, completion in self.answers(loading.load_evaluated(options), examples, options, known):
                yield (index, 0), completion
