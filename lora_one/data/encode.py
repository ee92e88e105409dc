"""The encoding of examples, the same for training, gradient and evaluation; encoders.py chooses the encoder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch

from lora_one.data.chat_template import check_template, end_of_turn, templated
from lora_one.errors import RunError, UsageError
from lora_one.losses import IGNORED, Batch
from lora_one.model_kinds import CAUSAL, ENCODER_DECODER
from lora_one.types import Example

ANCHOR = "\n"


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example and its labels.

    labels: for a causal model as long as input_ids, -100 at positions without a loss (the prompt); for an
    encoder-decoder the response with EOS; for a head the index of the class.
    decoder_ids: inputs of the decoder, labels shifted right by one position.
    token_types: 0 for the first of two texts and 1 for the second, for models with token types.
    """

    input_ids: list[int]
    labels: list[int] | int
    decoder_ids: list[int] | None = None
    token_types: list[int] | None = None

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the model reads, encoder and decoder together."""
        return len(self.input_ids) + len(self.decoder_ids or ())


@dataclass(frozen=True)
class EncodingCounts:
    """Numbers of examples that were kept whole, kept with a shortened text, or dropped because no label was left."""

    whole: int
    shortened: int
    dropped: int


def prompt_ids(tokenizer: Any, prompts: Sequence[str], *, chat: bool = False) -> list[list[int]]:
    """Return the token ids of prompts as the model reads them: with BOS if the tokenizer adds it, without EOS.

    chat: wrap each prompt in the tokenizer's chat template, including the start of the assistant's turn.
    Raises UsageError: the tokenizer has no chat template.
    """
    if not chat:
        ids = tokenizer(list(prompts), verbose=False)["input_ids"]
    else:
        check_template(tokenizer)
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = templated(tokenizer, turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # the template contains BOS
    eos = tokenizer.eos_token_id
    return [row[:-1] if len(row) > 1 and row[-1] == eos else row for row in ids]


def response_ids(tokenizer: Any, responses: Sequence[str]) -> list[list[int]]:
    """Return the token ids of responses as they continue a prompt, without EOS.

    SentencePiece tokenizers add a space at the start of a text. Each response is therefore tokenized after an anchor,
    whose tokens are removed, so that nothing is inserted between prompt and response.
    """
    anchor = tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]
    anchored = tokenizer([ANCHOR + text for text in responses], add_special_tokens=False, verbose=False)["input_ids"]
    # A tokenizer may merge the anchor with the response; such responses are tokenized alone
    merged = [text for text, ids in zip(responses, anchored, strict=True) if ids[: len(anchor)] != anchor]
    alone = iter(tokenizer(merged, add_special_tokens=False, verbose=False)["input_ids"] if merged else ())
    return [ids[len(anchor) :] if ids[: len(anchor)] == anchor else next(alone) for ids in anchored]


def embedded(rows: list[list[int]], vocabulary: int | None) -> list[list[int]]:
    """Return the rows of token ids, after checking that each token has an embedding.

    vocabulary: the number of the model's embeddings; None: unknown, so nothing is checked.
    Raises UsageError: a token has no embedding.
    """
    largest = max((max(row, default=0) for row in rows), default=0)
    if vocabulary is not None and largest >= vocabulary:
        raise UsageError(
            f"the tokenizer produces the token id {largest}, but the model has only {vocabulary} embeddings: use the "
            "tokenizer that belongs to the model, or call resize_token_embeddings and save the model again"
        )
    return rows


@dataclass(frozen=True)
class Encoder:
    """Encodes examples for a causal model: the tokens of the prompt, the tokens of the response, EOS.

    chat: wrap prompts in the tokenizer's chat template.  vocabulary: the number of the model's embeddings.
    train_on_inputs: the tokens of the prompt have a loss too, except the first token, which nothing predicts.
    All methods raise UsageError if a token has no embedding.
    """

    tokenizer: Any
    chat: bool = False
    vocabulary: int | None = None
    train_on_inputs: bool = False

    @classmethod
    def build(cls, tokenizer: Any, config: Any, vocabulary: int | None, *, chat: bool) -> Self:
        """Return the encoder for a model with this configuration of transformers."""
        return cls(tokenizer, chat, vocabulary)

    @property
    def pad_id(self) -> int:
        return pad_id_of(self.tokenizer)

    @property
    def stop(self) -> tuple[str, ...]:
        """Return the texts that end a completion besides EOS: the end of a turn in the chat template, if it is used."""
        end = end_of_turn(self.tokenizer) if self.chat else None
        return () if end is None else (end,)

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the token ids of each prompt."""
        prompts = [example.prompt for example in examples]
        return embedded(prompt_ids(self.tokenizer, prompts, chat=self.chat), self.vocabulary) if examples else []

    def encode(self, examples: Sequence[Example], max_length: int) -> tuple[list[Encoded], EncodingCounts]:
        """Encode examples, each truncated to its first max_length tokens.

        An example without a label within max_length is dropped. The counts say how many were shortened or dropped.
        """
        rows = self.rows(examples, max_length) if examples else []
        kept = [row for row, _ in rows if row is not None]
        shortened = sum(cut for row, cut in rows if row is not None)
        return kept, EncodingCounts(len(kept) - shortened, shortened, len(rows) - len(kept))

    def rows(self, examples: Sequence[Example], max_length: int) -> list[tuple[Encoded | None, bool]]:
        """Return each encoded example (None: dropped) and whether it was truncated; truncation removes EOS."""
        found: list[tuple[Encoded | None, bool]] = []
        for ids, answered in self.marked(examples):
            labels = [token if counts else IGNORED for token, counts in zip(ids, answered, strict=True)]
            if self.train_on_inputs and any(answered):
                labels = ids
            row = Encoded(ids[:max_length], labels[:max_length])
            useless = row.labels.count(IGNORED) == len(row.labels)
            found.append((None if useless else row, len(ids) > max_length))
        return found

    def marked(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], list[bool]]]:
        """Yield the tokens of each whole example, and which of them the model learns to write.

        These are the response and EOS; none if the prompt or the response is empty.
        """
        responses = embedded(response_ids(self.tokenizer, [row.response for row in examples]), self.vocabulary)
        for prompt, response in zip(self.prompts(examples), responses, strict=True):
            ids = prompt + response + [self.tokenizer.eos_token_id]
            learnt = bool(prompt and response)
            yield ids, [False] * len(prompt) + [learnt] * (len(ids) - len(prompt))

    def sizes(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of prompt and response of each example."""
        responses = response_ids(self.tokenizer, [example.response for example in examples])
        return [len(prompt) + len(response) for prompt, response in zip(self.prompts(examples), responses, strict=True)]

    def nothing_left(self, examples: Sequence[Example], max_length: int) -> RunError:
        """Return the error to raise if encoding drops every example."""
        return RunError(
            f"none of the {len(examples)} examples has a response token within max_length={max_length}: the prompts "
            f"are too long or the responses empty (shortest prompt: {min(map(len, self.prompts(examples)))} tokens); "
            "increase model.max_length (or init.max_length)"
        )


@dataclass(frozen=True)
class EncoderDecoderEncoder(Encoder):
    """Encodes examples for an encoder-decoder such as T5: prompt and response separately, each with EOS.

    Both are truncated to max_length.  start: the first token that the decoder reads.
    """

    start: int = 0

    @classmethod
    def build(cls, tokenizer: Any, config: Any, vocabulary: int | None, *, chat: bool) -> Self:
        """Return the encoder for a model. Raises UsageError: the configuration has no token for the decoder's start."""
        start = getattr(config, "decoder_start_token_id", None)
        if start is None:
            raise UsageError(
                f"model.type={ENCODER_DECODER.name}, but the config.json of {config.name_or_path} has no "
                f"decoder_start_token_id: use model.type={CAUSAL.name}, or add that token to the file"
            )
        return cls(tokenizer, chat, vocabulary, start)

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
    """Encodes the texts of a classification set, one text or a pair, joined by the tokenizer; the label is the class.

    If there are more than two texts, all after the first form the second one.
    """

    @classmethod
    def build(cls, tokenizer: Any, config: Any, vocabulary: int | None, *, chat: bool) -> Self:
        """Return the encoder for a model; a classification head reads texts without a chat template."""
        return cls(tokenizer, vocabulary=vocabulary)

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


def collate(examples: Sequence[Encoded], pad_id: int, side: Literal["left", "right"] = "right") -> Batch:
    """Return a batch padded to its longest example: input_ids, attention_mask, labels (batch, length), int64.

    Padding has the label -100. For an encoder-decoder, labels and decoder_input_ids (batch, response length) are padded
    separately; for a head, labels are (batch,).
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
    """Return the rows as one int64 tensor (rows, longest row), filled up with ``filler`` on one side."""
    longest = max(map(len, rows))
    fill = [[filler] * (longest - len(row)) for row in rows]
    pairs = zip(rows, fill, strict=True)
    return torch.tensor([row + pad if side == "right" else pad + row for row, pad in pairs])


def pack(examples: Sequence[Encoded]) -> Batch:
    """Concatenate examples in one row without padding: input_ids, position_ids and labels (1, length), int64.

    Positions start at 0 in every example. Without an attention_mask, transformers derives the boundaries of attention
    from them. The last token of an example does not predict the first token of the next one.
    """
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example.input_ids]]),
        "position_ids": torch.cat([torch.arange(len(example.input_ids)) for example in examples])[None],
        "labels": torch.tensor([[label for example in examples for label in (IGNORED, *example.labels[1:])]]),
    }


def batches_of(examples: Sequence[Encoded], size: int, pad_id: int) -> list[Batch]:
    """Return collated batches of ``size`` examples, in order; the last batch may be smaller."""
    return [collate(examples[start : start + size], pad_id) for start in range(0, len(examples), size)]


def common_beginning(rows: Sequence[list[int]]) -> list[int]:
    """Return the tokens that all rows begin with."""
    first, last = min(rows), max(rows)  # in lexicographic order all other rows are between these two
    differ = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(differ, len(first))]


def pad_id_of(tokenizer: Any) -> int:
    """Return the id of the padding token, else of EOS, else of the separator: padding is masked, so any token works."""
    ids = (getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "sep"))
    return next(token for token in ids if token is not None)
