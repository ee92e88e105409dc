"""Batches of an evaluation: which of several processes takes which, and what becomes of one that memory cannot hold."""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from lora_one.distributed import Processes
from lora_one.errors import RunError

T = TypeVar("T")
AUTOMATIC = {"cpu": 16}  # prompts at a time; on an accelerator FIRST_TRY, halved until it fits
FIRST_TRY = 128


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
