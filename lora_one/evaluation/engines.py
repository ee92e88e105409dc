"""Engines generate the completions of benchmarks that need nothing else from a model.

A new engine is a class here, or in a new file, and a line in ENGINES. Benchmarks that use likelihoods or a head need
the model itself and no engine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from lora_one.evaluation import loading
from lora_one.evaluation.benchmark import Request
from lora_one.evaluation.generate import Completion, Decoding, complete
from lora_one.evaluation.options import EvaluationOptions
from lora_one.types import Example


class Engine(Protocol):
    """Generates completions; with several processes, ``complete`` generates only this process's share."""

    @classmethod
    def serves(cls, options: EvaluationOptions) -> bool:
        """Return whether this engine generates for these options, usually by --model_name. Loads nothing."""

    @classmethod
    def start(cls, options: EvaluationOptions) -> Self:
        """Load the model."""

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the token ids of each prompt."""

    def complete(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, streams: Sequence[str]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) of each prompt, in any order; ``streams``: as in ``generate.complete``."""


@dataclass(frozen=True)
class Transformers:
    """Runs the model with transformers on this process's device."""

    loaded: loading.LoadedModel

    @classmethod
    def serves(cls, options: EvaluationOptions) -> bool:
        """Return True: this engine runs every model."""
        return True

    @classmethod
    def start(cls, options: EvaluationOptions) -> Self:
        """Load the checkpoint, with its adapter if there is one."""
        return cls(loading.load_evaluated(options))

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the token ids of each prompt, the same as in training."""
        return self.loaded.encoder.prompts(examples)

    def complete(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, streams: Sequence[str]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) of each prompt, longest prompts first."""
        loaded = self.loaded
        return complete(loaded.model, loaded.tokenizer, prompts, decoding, loaded.batch_size, streams)


# The first engine that serves the options is used; the last one serves all options.
ENGINES: dict[str, type[Engine]] = {
    "transformers": Transformers,
}


def engine_for(options: EvaluationOptions) -> Engine:
    """Start the first engine that serves these options."""
    return next(engine for engine in ENGINES.values() if engine.serves(options)).start(options)


def generated(
    examples: Sequence[Example], requests: Sequence[Request], options: EvaluationOptions
) -> Iterator[tuple[Request, Completion]]:
    """Yield (request, completion) of each request, in any order; without requests no model is loaded."""
    if not requests:
        return
    engine = engine_for(options)
    prompts = engine.prompts(examples)
    sampling = (options.temperature, options.top_p, options.seed)
    decoding = Decoding(options.max_new_tokens, *sampling, stop=options.stop)
    asked = [prompts[index] for index, _ in requests]
    streams = [f"{index}:{sample}" for index, sample in requests]
    for position, completion in engine.complete(asked, decoding, streams):
        yield requests[position], completion
