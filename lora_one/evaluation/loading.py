"""Load the model of an evaluation: a checkpoint, or an adapter on its base."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_one.errors import UsageError
from lora_one.evaluation.options import EvaluationOptions
from lora_one.evaluation.source import base_name

if TYPE_CHECKING:
    from torch import nn

    from lora_one.data.encode import Encoder
    from lora_one.model_kinds import ModelKind


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and the number of prompts in a batch.

    chat: prompts are wrapped in the tokenizer's chat template.
    """

    model: "nn.Module"
    tokenizer: Any
    batch_size: int
    chat: bool = False

    @property
    def kind(self) -> "ModelKind":
        """Return the kind of the model."""
        from lora_one.models import kind_of

        return kind_of(self.model)

    @property
    def encoder(self) -> "Encoder":
        """Return the encoder of the model, the same as in training."""
        from lora_one.data.encoders import encoder_of

        return encoder_of(self.kind, self.tokenizer, self.model.config, chat=self.chat)


def load_evaluated(options: EvaluationOptions) -> LoadedModel:
    """Load the model of --model_name and --adapter; without --batch_size, the batch size depends on the device.

    Raises UsageError: a classification head although text must be generated, or no chat template.
    """
    from lora_one.adaptation.checkpoints import kind_of_adapter, load_adapter
    from lora_one.data.chat_template import check_template
    from lora_one.data.encode import pad_id_of
    from lora_one.evaluation.batches import automatic
    from lora_one.models import kind_of_checkpoint, load_model, load_tokenizer
    from lora_one.records.folder import base_of, revision_of

    adapter = Path(options.adapter).expanduser() if options.adapter else None
    name = base_name(adapter) if options.model_name is None else options.model_name
    revision = revision_of(adapter, name)
    kind = (kind_of_adapter(adapter) if adapter is not None else None) or kind_of_checkpoint(name, revision)
    if kind.has_head and options.labels is None:
        raise UsageError(
            f"{options.model} has a classification head and cannot generate text: pass a model that generates text, or "
            "evaluate this one with eval_glue.py"
        )
    labels = options.labels if adapter is not None and kind.has_head else None
    tokenizer = load_tokenizer(name, revision, model_type=kind.name)
    if options.chat_template:
        check_template(tokenizer, "--chat_template")
    pad_id = pad_id_of(tokenizer)
    options_of_model = {"dtype": options.dtype, "model_type": kind.name, "labels": labels, "pad_id": pad_id}
    model = load_model(name, revision, where=options.device, **options_of_model | base_of(adapter, options.dtype))
    batch_size = automatic(model) if options.batch_size is None else options.batch_size
    if adapter is not None:
        model = load_adapter(model, adapter)
    return LoadedModel(model.eval(), tokenizer, batch_size, bool(options.chat_template))
