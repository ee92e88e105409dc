"""One encoding for training, gradient and evaluation: tokens of the prompt, then tokens of the response, then EOS."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_one.errors import RunError, UsageError
from lora_one.losses import IGNORED, Batch
from lora_one.types import Example

ANCHOR = "\n"


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of one example, of equal length; prompt positions carry the label -100."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class EncodingCounts:
    """What became of the examples: kept whole, kept with a shortened answer, or dropped without any."""

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
    alone = tokenizer(list(responses), add_special_tokens=False, verbose=False)["input_ids"]
    anchored = tokenizer([ANCHOR + text for text in responses], add_special_tokens=False, verbose=False)["input_ids"]
    return [
        behind[len(anchor) :] if behind[: len(anchor)] == anchor else bare
        for behind, bare in zip(anchored, alone, strict=True)
    ]


def encode(
    tokenizer: Any, examples: Sequence[Example], max_length: int, *, chat: bool = False
) -> tuple[list[Encoded], EncodingCounts]:
    """Encode examples, cut at max_length tokens from the right.

    An example with no answer token left within max_length is dropped and counted; one whose answer is cut is
    kept, without EOS, and counted.
    """
    prompts = prompt_ids(tokenizer, [example.prompt for example in examples], chat=chat) if examples else []
    responses = response_ids(tokenizer, [example.response for example in examples]) if examples else []
    encoded: list[Encoded] = []
    shortened = dropped = 0
    for prompt, response in zip(prompts, responses, strict=True):
        ids = prompt + response + [tokenizer.eos_token_id]
        if not prompt or not response or len(prompt) >= max_length:
            dropped += 1
            continue
        shortened += len(ids) > max_length
        labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
        encoded.append(Encoded(ids[:max_length], labels[:max_length]))
    return encoded, EncodingCounts(len(encoded) - shortened, shortened, dropped)


def no_answers(tokenizer: Any, examples: Sequence[Example], max_length: int, *, chat: bool = False) -> RunError:
    """The error to raise where encoding leaves nothing."""
    shortest = min(map(len, prompt_ids(tokenizer, [example.prompt for example in examples], chat=chat)))
    return RunError(
        f"none of the {len(examples)} examples has an answer token within max_length={max_length}: their prompts are "
        f"too long or their answers empty (shortest prompt: {shortest} tokens); raise model.max_length (or "
        "init.max_length)"
    )


def collate(examples: Sequence[Encoded], pad_id: int, side: Literal["left", "right"] = "right") -> Batch:
    """Pad to the longest: input_ids, attention_mask and labels (batch, length), int64; padding has label -100."""
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        fill = [[filler] * (longest - len(row)) for row in rows]
        pairs = zip(rows, fill, strict=True)
        return torch.tensor([row + pad if side == "right" else pad + row for row, pad in pairs])

    return {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORED),
    }


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
    """The padding token's id, else that of EOS: padding is masked everywhere, so no new token is needed."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
