"""Batches of an evaluation: which of several processes takes which, and what becomes of one that memory cannot hold."""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from lora_one.data.order import fitting
from lora_one.distributed import Processes
from lora_one.errors import RunError

T = TypeVar("T")
AUTOMATIC = {"cpu": 16}  # prompts at a time; on an accelerator FIRST_TRY, halved until it fits
FIRST_TRY = 128
TOKENS = {"cpu": 2**11}  # of a batch for the loss, with padding; on an accelerator MANY_TOKENS, halved until it fits
MANY_TOKENS = 2**14
LOGITS = {"cpu": 2**29}  # bytes of that batch's logits in fp32
MANY_LOGITS = 2**31


def automatic(model: nn.Module) -> int:
    """Where no batch size is asked for: a small one on a CPU, whose memory no error guards, else one to be halved."""
    return AUTOMATIC.get(next(model.parameters()).device.type, FIRST_TRY)


def each_batch(
    order: Sequence[int],
    batch_size: int,
    work: Callable[[Sequence[int]], T],
    done: Container[int] = (),
    processes: Processes = Processes(),  # noqa: B008 (frozen)
) -> Iterator[tuple[Sequence[int], T]]:
    """(batch, work(batch)) of this process's batches, those left out that are done.

    Batches are cut from the whole order, so neither what is done nor who asks changes their company. One that does not
    fit in memory is halved, and so are those behind it. Raises RunError: a single item does not fit.
    """
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    fits = batch_size
    for batch in batches[processes.rank :: processes.count]:
        if all(index in done for index in batch):
            continue
        start = 0
        while start < len(batch):
            part = batch[start : start + fits]
            try:
                found: Any = work(part)
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise RunError(
                        "the device's memory does not hold one prompt: take --dtype=bf16, fewer --max_new_tokens, or a "
                        "larger device"
                    ) from error
                fits = len(part) // 2
            else:
                yield part, found
                start += len(part)
                continue
            if torch.cuda.is_available():  # outside the handler, whose traceback holds the tensors that did not fit
                torch.cuda.empty_cache()


def automatic_tokens(model: nn.Module, outputs: int) -> int:
    """How many tokens a batch for the loss may hold; outputs: logits per token."""
    device = next(model.parameters()).device.type
    return min(TOKENS.get(device, MANY_TOKENS), LOGITS.get(device, MANY_LOGITS) // (4 * outputs))


def each_that_fits(
    order: Sequence[int], lengths: Sequence[int], tokens: int, work: Callable[[Sequence[int]], T]
) -> Iterator[T]:
    """``work(batch)`` for consecutive batches of at most ``tokens`` tokens with padding; order: the longest first.

    Where the memory does not hold a batch, it and those after it hold half the tokens.
    Raises RunError: the memory does not hold a single example.
    """
    while order:
        batch = fitting(order, lengths, tokens)
        try:
            found = work(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise RunError(
                    f"the device's memory does not hold one example of {lengths[batch[0]]} tokens for its loss: lower "
                    "model.max_length, or take a larger device"
                ) from error
            tokens = len(batch) // 2 * lengths[batch[0]]
        else:
            yield found
            order = order[len(batch) :]
            continue
        if torch.cuda.is_available():  # outside the handler, whose traceback holds the tensors that did not fit
            torch.cuda.empty_cache()
