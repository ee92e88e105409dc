"""Engines: what generates completions for the benchmarks that only generate.

A new engine is a class here, or in a file of its own, and a line in ENGINES. Benchmarks that read likelihoods or a
head need the model itself and do not use an engine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from lora_one.data.encode import encoder_of
from lora_one.evaluation import loading
from lora_one.evaluation.benchmark import Request
from lora_one.evaluation.generate import Completion, Decoding, complete
from lora_one.evaluation.options import EvaluationOptions
from lora_one.models import kind_of
from lora_one.types import Example


class Engine(Protocol):
    """Generates completions. With several processes, an engine itself divides the prompts among them."""

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
        """Yield (index, completion) of each prompt, in any order; streams as in the function ``generate.complete``."""


@dataclass(frozen=True)
class Transformers:
    """The model on this process's device, run by transformers."""

    loaded: loading.LoadedModel

    @classmethod
    def serves(cls, options: EvaluationOptions) -> bool:
        """Return True: every model."""
        return True

    @classmethod
    def start(cls, options: EvaluationOptions) -> Self:
        """Load the checkpoint, with its adapter."""
        return cls(loading.load_evaluated(options))

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the token ids of each prompt, as in training."""
        model = self.loaded.model
        return encoder_of(kind_of(model), self.loaded.tokenizer, model.config).prompts(examples)

    def complete(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, streams: Sequence[str]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) of each prompt, longest prompts first."""
        loaded = self.loaded
        return complete(loaded.model, loaded.tokenizer, prompts, decoding, loaded.batch_size, streams)


# The first engine that serves the options generates; the last one serves all.
ENGINES: dict[str, type[Engine]] = {
    "transformers": Transformers,
}


def engine_for(options: EvaluationOptions) -> Engine:
    """Start the first engine that serves these options."""
    return next(engine for engine in ENGINES.values() if engine.serves(options)).start(options)


def generated(
    examples: Sequence[Example], requests: Sequence[Request], options: EvaluationOptions
) -> Iterator[tuple[Request, Completion]]:
    """Yield (request, completion) of each request, in any order; without requests nothing is loaded."""
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
