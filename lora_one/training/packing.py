"""Packing (several examples in one row): check that the model keeps the examples apart."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import masking_utils

from lora_one.data.encode import Encoded, pack
from lora_one.data.encoded_cache import lengths_of
from lora_one.errors import UsageError
from lora_one.losses import evaluating, model_logits


@torch.no_grad()
def check_packing(model: nn.Module, examples: Sequence[Encoded]) -> None:
    """Check that two examples in one row get the same logits as each of them alone.

    Raises UsageError: the attention of this model crosses their boundary, or its positions do not restart there.
    """
    pair = [examples[place] for place in lengths_of(examples).argsort(stable=True)[:2].tolist()]
    with evaluating(model):
        alone = torch.cat([model_logits(model, pack([example]))[0] for example in pair]).float()
        together = model_logits(model, pack(pair))[0].float()
    change = float((together - alone).abs().max() / alone.abs().max())
    rounding = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
    if not change <= rounding:
        raise UsageError(
            f"model.packing=true is not supported by this model: its attention does not separate examples in one row "
            f"(logits change by {change:.2g} of the largest one); drop model.packing"
        )


@contextmanager
def one_example_per_row() -> Iterator[None]:
    """Turn off transformers' search for packed examples, which makes the host wait in every forward pass."""
    search = getattr(masking_utils, "find_packed_sequence_indices", None)
    if search is None:  # another version of transformers
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None  # its result for one example per row
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search
