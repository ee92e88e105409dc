"""What an engine is."""

from collections.abc import Container, Iterator, Sequence
from typing import Any, Protocol, Self

from lora_one.data.encode import Encoder
from lora_one.errors import RunError
from lora_one.evaluation.choices import Question
from lora_one.evaluation.decoding import Completion, Decoding
from lora_one.evaluation.options import EvaluationOptions
from lora_one.model_kinds import ModelKind


class NoLikelihoods(RunError):
    """The engine cannot compute log-likelihoods."""


class Engine(Protocol):
    """Computes completions and log-likelihoods for the benchmarks.

    tokenizer, encoder: of the model, as in training.  kind: of the model.  context: its number of positions.
    With several processes, each one computes and yields its share.
    """

    tokenizer: Any
    encoder: Encoder
    kind: ModelKind
    context: int

    @classmethod
    def check(cls, options: EvaluationOptions) -> None:
        """Raise UsageError if this engine cannot run a model of this kind. Loads no model."""

    @classmethod
    def start(cls, options: EvaluationOptions) -> Self:
        """Load the model, or connect to it. Raises UsageError, RunError: it cannot be used."""

    @classmethod
    def identity(cls, options: EvaluationOptions) -> dict[str, Any]:
        """Return the version and settings that may change a result, as plain JSON. Loads no model."""

    def close(self) -> None:
        """Free what the engine holds; it is not used afterwards."""

    def generate(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, streams: Sequence[str], done: Container[int] = ()
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) of each prompt that is not in ``done``, in any order.

        prompts: token ids.  streams: names of the random numbers of each prompt, as in ``generate.complete``.
        """

    def log_likelihoods(
        self, questions: Sequence[Question], done: Container[int] = (), *, long: bool = False
    ) -> Iterator[tuple[int, list[float]]]:
        """Yield (index, [log p(answer | context) of each answer]) of each question that is not in ``done``.

        Raises NoLikelihoods: the engine cannot compute them.

        long: the answers are long, so the memory that is needed depends on their number of tokens.
        """
