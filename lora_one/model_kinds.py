"""The kinds of models that can be trained, and all facts about each. This file does not import torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# An example has one answer for a head, not one for each token, so that 8 say little: with them the start raised the
# loss of MiniLM-L6 on 300 other examples by up to 0.18, with 32 by up to 0.06 (20 draws, docs/comparisons.md)
LEAST_OF_HEAD = 32


@dataclass(frozen=True)
class ModelKind:
    """All facts about one kind of model that other modules need.

    name: the value of ``model.type``.  auto_class: the class of transformers that loads it.  task_type: PEFT's name.
    has_decoder: the prompt is the encoder's input, and the decoder writes the response.
    head_modules: first parts of the names that transformers gives to the modules of a classification head; empty: the
    model generates text.  label_dimensions: number of dimensions of a batch's labels.
    """

    name: str
    auto_class: str
    task_type: str
    has_decoder: bool = False
    head_modules: tuple[str, ...] = ()
    label_dimensions: int = 2  # (batch, length)

    @property
    def has_head(self) -> bool:
        """Return whether the model chooses a class instead of generating text."""
        return bool(self.head_modules)

    def searched(self, wanted: int) -> int:
        """Return how many further examples a search for the scale uses by default, for a gradient over ``wanted``."""
        return max(wanted, LEAST_OF_HEAD) if self.has_head else wanted


CAUSAL = ModelKind("CausalLM", "AutoModelForCausalLM", "CAUSAL_LM")
ENCODER_DECODER = ModelKind("ConditionalGeneration", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", has_decoder=True)
CLASSIFIER = ModelKind(
    "SequenceClassification",
    "AutoModelForSequenceClassification",
    "SEQ_CLS",
    head_modules=("classifier", "score", "pre_classifier"),
    label_dimensions=1,  # (batch,)
)
# endings of the names of classes whose labels belong to another task
OTHER_TASKS = (
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForPreTraining",
    "ForQuestionAnswering",
    "ForTokenClassification",
)
MODEL_KINDS = {kind.name: kind for kind in (CAUSAL, ENCODER_DECODER, CLASSIFIER)}
BY_TASK_TYPE = {kind.task_type: kind for kind in MODEL_KINDS.values()}


def kind_by_architecture(class_names: Iterable[str], config: Any) -> ModelKind:
    """Return the kind of a model of transformers, given the names of its classes and its configuration."""
    if any(name.endswith(f"For{CLASSIFIER.name}") for name in class_names):
        return CLASSIFIER
    return ENCODER_DECODER if getattr(config, "is_encoder_decoder", False) else CAUSAL
