"""Batches of an evaluation: divided among the processes, and made smaller if they do not fit in memory."""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_one.data.order import fitting
from lora_one.distributed import Processes
from lora_one.errors import RunError

T = TypeVar("T")
AUTOMATIC = {"cpu": 16}  # prompts in a batch; on an accelerator FIRST_TRY, halved until a batch fits
FIRST_TRY = 128
TOKENS = {"cpu": 2**11}  # tokens of a batch for the loss, with padding; on an accelerator MANY_TOKENS, halved likewise
MANY_TOKENS = 2**14
LOGITS = {"cpu": 2**29}  # bytes of the logits of that batch in fp32
MANY_LOGITS = 2**31


def automatic(model: nn.Module) -> int:
    """Return the default batch size: small on a CPU, which raises no out-of-memory error, else one to be halved."""
    return AUTOMATIC.get(next(model.parameters()).device.type, FIRST_TRY)


def each_batch(
    order: Sequence[int],
    batch_size: int,
    work: Callable[[Sequence[int]], T],
    done: Container[int] = (),
    processes: Processes = Processes(),  # noqa: B008 (frozen)
) -> Iterator[tuple[Sequence[int], T]]:
    """Yield (batch, work(batch)) for this process's batches; batches whose items are all in ``done`` are left out.

    Batches are cut from the whole order, so a batch has the same items whatever is done and whichever process computes
    it. A batch that does not fit in memory is halved, and so are all later ones.
    Raises RunError: a single item does not fit.
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
                        "a single prompt does not fit in the device's memory: use --dtype=bf16, a smaller "
                        "--max_new_tokens or --max_length, or a device with more memory"
                    ) from error
                fits = len(part) // 2
            else:
                yield part, found
                start += len(part)
                continue
            if torch.cuda.is_available():  # after the handler, because its traceback refers to the tensors
                torch.cuda.empty_cache()


def automatic_tokens(model: nn.Module, outputs: int) -> int:
    """Return the maximal number of tokens in a batch for the loss; outputs: logits per token."""
    device = next(model.parameters()).device.type
    return min(TOKENS.get(device, MANY_TOKENS), LOGITS.get(device, MANY_LOGITS) // (4 * outputs))


def each_that_fits(
    order: Sequence[int], lengths: Sequence[int] | Tensor, tokens: int, work: Callable[[Sequence[int]], T]
) -> Iterator[T]:
    """Yield ``work(batch)`` for consecutive batches of at most ``tokens`` tokens with padding; order: longest first.

    If a batch does not fit in memory, the maximal number of tokens is halved for it and all later ones.
    Raises RunError: a single example does not fit.
    """
    while order:
        batch = fitting(order, lengths, tokens)
        try:
            found = work(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise RunError(
                    f"the loss of a single example of {int(lengths[batch[0]])} tokens does not fit in the device's "
                    "memory: lower model.max_length, or use a device with more memory"
                ) from error
            tokens = len(batch) // 2 * int(lengths[batch[0]])
        else:
            yield found
            order = order[len(batch) :]
            continue
        if torch.cuda.is_available():  # after the handler, because its traceback refers to the tensors
            torch.cuda.empty_cache()
