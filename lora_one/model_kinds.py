"""The kinds of models that can be trained, and every fact about each. Nothing here imports torch."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelKind:
    """Everything about a kind of model that other rooms ask for.

    name: the value of ``model.type``.  auto_class: the class of transformers that loads it.  task_type: PEFT's word.
    has_decoder: prompt and response are separate, and the decoder has inputs of its own.
    head_modules: where transformers keeps a classification head, by the first part of a module's name; empty: the
    model writes text.  label_dimensions: of a batch's labels.
    """

    name: str
    auto_class: str
    task_type: str
    has_decoder: bool = False
    head_modules: tuple[str, ...] = ()
    label_dimensions: int = 2  # (batch, length)

    @property
    def has_head(self) -> bool:
        """Return whether the model chooses a class instead of writing text."""
        return bool(self.head_modules)


CAUSAL = ModelKind("CausalLM", "AutoModelForCausalLM", "CAUSAL_LM")
ENCODER_DECODER = ModelKind("ConditionalGeneration", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", has_decoder=True)
CLASSIFIER = ModelKind(
    "SequenceClassification",
    "AutoModelForSequenceClassification",
    "SEQ_CLS",
    head_modules=("classifier", "score", "pre_classifier"),
    label_dimensions=1,  # (batch,)
)
MODEL_KINDS = {kind.name: kind for kind in (CAUSAL, ENCODER_DECODER, CLASSIFIER)}
BY_TASK_TYPE = {kind.task_type: kind for kind in MODEL_KINDS.values()}


def kind_by_architecture(class_names: Iterable[str], *, encoder_decoder: bool) -> ModelKind:
    """Return the kind of a model of transformers, by the names of its classes and what its configuration says."""
    if any(name.endswith(f"For{CLASSIFIER.name}") for name in class_names):
        return CLASSIFIER
    return ENCODER_DECODER if encoder_decoder else CAUSAL
