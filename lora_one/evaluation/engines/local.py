"""The default engine: transformers, in this process."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Self

from lora_one.data.encode import Encoder
from lora_one.evaluation import loading
from lora_one.evaluation.batches import automatic_tokens
from lora_one.evaluation.choices import Question, log_likelihoods, most_tokens
from lora_one.evaluation.decoding import Completion, Decoding
from lora_one.evaluation.generate import complete, context_length
from lora_one.evaluation.options import EvaluationOptions
from lora_one.model_kinds import ModelKind


@dataclass(frozen=True)
class Transformers:
    """Runs the model with transformers on this process's device.

    batch_size: questions in a batch with long answers; None: as many as fit.
    """

    loaded: loading.LoadedModel
    batch_size: int | None = None

    @classmethod
    def check(cls, options: EvaluationOptions) -> None:
        """Do nothing: transformers runs every kind of model."""

    @classmethod
    def start(cls, options: EvaluationOptions) -> Self:
        """Load the checkpoint, with its adapter if there is one."""
        return cls(loading.load_evaluated(options), options.batch_size)

    @classmethod
    def identity(cls, options: EvaluationOptions) -> dict[str, Any]:
        """Return the version of transformers."""
        return {"version": version("transformers")}

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def encoder(self) -> Encoder:
        return self.loaded.encoder

    @property
    def kind(self) -> ModelKind:
        return self.loaded.kind

    @property
    def context(self) -> int:
        return context_length(self.loaded.model)

    def close(self) -> None:
        """Do nothing: the model is freed with the last reference to it."""

    def generate(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, streams: Sequence[str], done: Container[int] = ()
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) of each prompt, longest prompts first."""
        loaded = self.loaded
        decoding = replace(decoding, stop=(*decoding.stop, *self.encoder.stop))
        return complete(loaded.model, loaded.tokenizer, prompts, decoding, loaded.batch_size, streams, done)

    def log_likelihoods(
        self, questions: Sequence[Question], done: Container[int] = (), *, long: bool = False
    ) -> Iterator[tuple[int, list[float]]]:
        """Yield (index, [log p(answer | context) of each answer]), longest questions first."""
        model, size = self.loaded.model, self.loaded.batch_size
        if long:
            most = automatic_tokens(model, model.config.get_text_config().vocab_size)
            size = self.batch_size or max(1, most // most_tokens(questions))
        return log_likelihoods(model, questions, size, done)
