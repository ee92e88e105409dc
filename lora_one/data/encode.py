"""One encoding for training, gradient and evaluation, in three forms: for causal models, encoder-decoders and heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_one.config.schemas import ModelConfig
from lora_one.datasets.settings import DatasetConfig
from lora_one.errors import RunError, UsageError
from lora_one.losses import IGNORED, Batch
from lora_one.model_kinds import CAUSAL, ModelKind
from lora_one.models import load_config, load_tokenizer
from lora_one.types import Example

ANCHOR = "\n"


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example and what is to be predicted.

    labels: for a causal model as long as input_ids, -100 at prompt positions; for an encoder-decoder the response with
    its EOS, and decoder_ids what the decoder reads in front of each of them; for a head the index of the class.
    token_types: of two texts, for models that tell them apart so.
    """

    input_ids: list[int]
    labels: list[int] | int
    decoder_ids: list[int] | None = None
    token_types: list[int] | None = None

    @property
    def tokens(self) -> int:
        """How many tokens the model reads, encoder and decoder together."""
        return len(self.input_ids) + len(self.decoder_ids or ())


@dataclass(frozen=True)
class EncodingCounts:
    """What became of the examples: kept whole, kept with a text cut short, or dropped (nothing to learn left)."""

    whole: int
    shortened: int
    dropped: int


def prompt_ids(tokenizer: Any, prompts: Sequence[str], *, chat: bool = False) -> list[list[int]]:
    """Token ids of prompts as the model sees them before a response: BOS where the tokenizer puts one, no EOS.

    chat: wrap each prompt in the tokenizer's chat format, up to where the assistant speaks.
    Raises UsageError: chat wanted of a tokenizer that has no chat format.
    """
    if not chat:
        ids = tokenizer(list(prompts), verbose=False)["input_ids"]
    elif tokenizer.chat_template is None:
        raise UsageError(
            "dataset.chat_template=true, but this tokenizer has no chat format; drop it, or take a chat model"
        )
    else:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # the format holds its own BOS
    eos = tokenizer.eos_token_id
    return [row[:-1] if len(row) > 1 and row[-1] == eos else row for row in ids]


def response_ids(tokenizer: Any, responses: Sequence[str]) -> list[list[int]]:
    """Token ids of responses as they continue a prompt, without EOS.

    SentencePiece tokenizers put a space in front of a text; behind an anchor they do not, so the tokens of
    prompt and response together spell the two texts and nothing between them.
    """
    anchor = tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
    anchored = tokenizer([ANCHOR + text for text in responses], add_special_tokens=False, verbose=False)["input_ids"]
    grown = [text for text, ids in zip(responses, anchored, strict=True) if ids[: len(anchor)] != anchor]  # together
    alone = iter(tokenizer(grown, add_special_tokens=False, verbose=False)["input_ids"] if grown else ())
    return [ids[len(anchor) :] if ids[: len(anchor)] == anchor else next(alone) for ids in anchored]


def embedded(rows: list[list[int]], vocabulary: int | None) -> list[list[int]]:
    """The rows of token ids, all of them below ``vocabulary``, the number of the model's embeddings (None: any).

    Raises UsageError: a token has no embedding.
    """
    largest = max((max(row, default=0) for row in rows), default=0)
    if vocabulary is not None and largest >= vocabulary:
        raise UsageError(
            f"the tokenizer gives the token id {largest}, but the model has embeddings for {vocabulary} tokens alone: "
            "give the tokenizer that belongs to the model, or call resize_token_embeddings and save the model again"
        )
    return rows


@dataclass(frozen=True)
class Encoder:
    """Encodes examples for a causal model: tokens of the prompt, then tokens of the response, then EOS.

    chat: wrap prompts in the tokenizer's chat format.  vocabulary: the number of the model's embeddings.
    All methods raise UsageError where a token has no embedding.
    """

    tokenizer: Any
    chat: bool = False
    vocabulary: int | None = None

    @property
    def pad_id(self) -> int:
        return pad_id_of(self.tokenizer)

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """What the model is given to answer."""
        prompts = [example.prompt for example in examples]
        return embedded(prompt_ids(self.tokenizer, prompts, chat=self.chat), self.vocabulary) if examples else []

    def encode(self, examples: Sequence[Example], max_length: int) -> tuple[list[Encoded], EncodingCounts]:
        """Encode examples, cut at max_length tokens from the right.

        An example with nothing left to learn within max_length is dropped and counted; one of which a part is cut is
        kept and counted.
        """
        rows = self.rows(examples, max_length) if examples else []
        kept = [row for row, _ in rows if row is not None]
        shortened = sum(cut for row, cut in rows if row is not None)
        return kept, EncodingCounts(len(kept) - shortened, shortened, len(rows) - len(kept))

    def rows(self, examples: Sequence[Example], max_length: int) -> list[tuple[Encoded | None, bool]]:
        """Each example, None where it is dropped, and whether it was cut. An answer that is cut has no EOS."""
        found: list[tuple[Encoded | None, bool]] = []
        responses = embedded(response_ids(self.tokenizer, [row.response for row in examples]), self.vocabulary)
        for prompt, response in zip(self.prompts(examples), responses, strict=True):
            ids = prompt + response + [self.tokenizer.eos_token_id]
            labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
            useless = not prompt or not response or len(prompt) >= max_length
            row = None if useless else Encoded(ids[:max_length], labels[:max_length])
            found.append((row, len(ids) > max_length))
        return found

    def sizes(self, examples: Sequence[Example]) -> list[int]:
        """Tokens of prompt and response."""
        responses = response_ids(self.tokenizer, [example.response for example in examples])
        return [len(prompt) + len(response) for prompt, response in zip(self.prompts(examples), responses, strict=True)]

    def nothing_left(self, examples: Sequence[Example], max_length: int) -> RunError:
        """The error to raise where encoding leaves nothing."""
        return RunError(
            f"none of the {len(examples)} examples has an answer token within max_length={max_length}: their prompts "
            f"are too long or their answers empty (shortest prompt: {min(map(len, self.prompts(examples)))} tokens); "
            "raise model.max_length (or init.max_length)"
        )


@dataclass(frozen=True)
class EncoderDecoderEncoder(Encoder):
    """Prompt and response apart, each with its EOS, each cut at max_length: for T5 and its like.

    start: the token in front of what the decoder writes.
    """

    start: int = 0

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        return [[*ids, self.tokenizer.eos_token_id] for ids in super().prompts(examples)]

    def rows(self, examples: Sequence[Example], max_length: int) -> list[tuple[Encoded | None, bool]]:
        eos = self.tokenizer.eos_token_id
        found: list[tuple[Encoded | None, bool]] = []
        responses = embedded(prompt_ids(self.tokenizer, [row.response for row in examples]), self.vocabulary)
        for example, prompt, response in zip(examples, self.prompts(examples), responses, strict=True):
            labels = [*response, eos][:max_length]
            ids = prompt if len(prompt) <= max_length else [*prompt[: max_length - 1], eos]
            row = Encoded(ids, labels, decoder_ids=[self.start, *labels[:-1]])
            cut = max(len(prompt), len(response) + 1) > max_length
            found.append((row if example.prompt and example.response else None, cut))
        return found


@dataclass(frozen=True)
class ClassEncoder(Encoder):
    """The texts of a classification set, one or a pair, as the tokenizer joins them; the class is the label.

    What goes beyond a pair is joined to its second text.
    """

    def rows(self, examples: Sequence[Example], max_length: int) -> list[tuple[Encoded | None, bool]]:
        first = [example.texts[0] for example in examples]
        second = [" ".join(example.texts[1:]) for example in examples] if len(examples[0].texts) > 1 else None
        whole = embedded(self.tokenizer(first, second, verbose=False)["input_ids"], self.vocabulary)
        encoded = self.tokenizer(first, second, truncation=True, max_length=max_length)
        types = encoded.get("token_type_ids", [None] * len(examples))
        return [
            (Encoded(ids, example.label, token_types=kinds), len(uncut) > max_length)
            for example, ids, kinds, uncut in zip(examples, encoded["input_ids"], types, whole, strict=True)
        ]


def encoder_of(kind: ModelKind, tokenizer: Any, config: Any, *, chat: bool = False) -> Encoder:
    """Return the encoder of a kind of model; config: the model's, of transformers.

    Raises UsageError: an encoder-decoder that does not say what its decoder starts with; padding without an embedding.
    """
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    embedded([[pad_id_of(tokenizer)]], vocabulary)
    if kind is CAUSAL:
        return Encoder(tokenizer, chat, vocabulary)
    if kind.has_head:
        return ClassEncoder(tokenizer, vocabulary=vocabulary)
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise UsageError(
            f"model.type={kind.name}, but {config.name_or_path} has no decoder_start_token_id in its config.json: take "
            f"model.type={CAUSAL.name}, or set that token there"
        )
    return EncoderDecoderEncoder(tokenizer, chat, vocabulary, start)


def encoder_for(model: ModelConfig, dataset: DatasetConfig) -> Encoder:
    """The same for a run. Raises RunError: tokenizer or configuration cannot be loaded."""
    tokenizer = load_tokenizer(model.name, model.revision, model.type)
    config = load_config(model.name, model.revision)
    return encoder_of(model.kind, tokenizer, config, chat=dataset.chat_template)


def collate(examples: Sequence[Encoded], pad_id: int, side: Literal["left", "right"] = "right") -> Batch:
    """Pad to the longest: input_ids, attention_mask and labels (batch, length), int64; padding has label -100.

    For an encoder-decoder labels and decoder_input_ids have a length of their own, for a head labels are (batch,).
    """
    batch = {
        "input_ids": padded([example.input_ids for example in examples], pad_id, side),
        "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0, side),
    }
    if examples[0].token_types is not None:
        batch["token_type_ids"] = padded([example.token_types for example in examples], 0, side)
    if examples[0].decoder_ids is not None:
        batch["decoder_input_ids"] = padded([example.decoder_ids for example in examples], pad_id)
        side = "right"
    labels = [example.labels for example in examples]
    return batch | {"labels": torch.tensor(labels) if isinstance(labels[0], int) else padded(labels, IGNORED, side)}


def padded(rows: list[list[int]], filler: int, side: Literal["left", "right"] = "right") -> torch.Tensor:
    longest = max(map(len, rows))
    fill = [[filler] * (longest - len(row)) for row in rows]
    pairs = zip(rows, fill, strict=True)
    return torch.tensor([row + pad if side == "right" else pad + row for row, pad in pairs])


def pack(examples: Sequence[Encoded]) -> Batch:
    """One behind the other in one row without padding: input_ids, position_ids and labels (1, length), int64.

    Positions begin anew with every example; from them, where no attention_mask is given, the attention of
    transformers takes its boundaries. No token predicts the first one of the next example.
    """
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example.input_ids]]),
        "position_ids": torch.cat([torch.arange(len(example.input_ids)) for example in examples])[None],
        "labels": torch.tensor([[label for example in examples for label in (IGNORED, *example.labels[1:])]]),
    }


def batches_of(examples: Sequence[Encoded], size: int, pad_id: int) -> list[Batch]:
    """Collated batches of ``size`` examples in order; the last may be smaller."""
    return [collate(examples[start : start + size], pad_id) for start in range(0, len(examples), size)]


def pad_id_of(tokenizer: Any) -> int:
    """The id of the padding token, else of EOS, else of the separator: all padding is masked, so any token serves."""
    ids = (getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "sep"))
    return next(token for token in ids if token is not None)
