"""The choice of the encoder: by the kind of the model, and by whether the data set has conversations."""

from dataclasses import replace
from typing import Any

from lora_one.config.schemas import ModelConfig
from lora_one.data.conversations import ConversationEncoder
from lora_one.data.encode import ClassEncoder, Encoder, EncoderDecoderEncoder, embedded, pad_id_of
from lora_one.datasets import DATASETS
from lora_one.datasets.settings import DatasetConfig
from lora_one.model_kinds import CAUSAL, CLASSIFIER, ENCODER_DECODER, ModelKind
from lora_one.models import load_config, load_tokenizer

ENCODERS: dict[ModelKind, type[Encoder]] = {
    CAUSAL: Encoder,
    ENCODER_DECODER: EncoderDecoderEncoder,
    CLASSIFIER: ClassEncoder,
}


def encoder_of(
    kind: ModelKind, tokenizer: Any, config: Any, *, chat: bool = False, conversations: bool = False
) -> Encoder:
    """Return the encoder for a model of this kind; config: the model's configuration (of transformers).

    Raises UsageError: the padding token has no embedding, an encoder-decoder has no start token for its decoder, or
    the tokenizer has no chat template for conversations.
    """
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    embedded([[pad_id_of(tokenizer)]], vocabulary)
    encoder = ConversationEncoder if conversations else ENCODERS[kind]
    return encoder.build(tokenizer, config, vocabulary, chat=chat)


def encoder_for(model: ModelConfig, dataset: DatasetConfig) -> Encoder:
    """Return the encoder of a run. Raises RunError: tokenizer or configuration cannot be loaded."""
    tokenizer = load_tokenizer(model.name, model.revision, model.type)
    config = load_config(model.name, model.revision)
    conversations = DATASETS[dataset.name].conversations
    encoder = encoder_of(model.kind, tokenizer, config, chat=dataset.chat_template, conversations=conversations)
    return replace(encoder, train_on_inputs=dataset.train_on_inputs)
