"""Regroup examples of similar length into larger batches, for forward passes without gradients."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import pad

from lora_one.distributed import Processes
from lora_one.losses import IGNORED, Batch, Reduction, batch_count, batch_loss, evaluating, targets

MAX_TOKENS = 4096  # per batch, with padding
MAX_LOGITS = 2**29  # bytes of a batch's logits in fp32
# Values of padding on the right; input_ids take the padding token.
FILLERS = {"input_ids": None, "decoder_input_ids": None, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}


def forward_batches(model: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
    """Return the same examples in fewer and larger batches, for forward passes without gradients; see ``regrouped``."""
    config = model.config.get_text_config()
    pad_id = 0 if batches[0]["labels"].dim() == 2 else config.pad_token_id  # masked; a head finds its token by it
    return regrouped(batches, pad_id, config.vocab_size, Processes.current().count)


@torch.no_grad()
def batches_loss(model: nn.Module, batches: Sequence[Batch], reduction: Reduction) -> float:
    """Return the mean loss without dropout; several processes share the batches and get the same result."""
    processes = Processes.current()
    total = 0.0
    with evaluating(model):
        for batch, weight in processes.share(batches):
            total += weight * float(batch_loss(model, batch, reduction)[0])
    return processes.total(total) / sum(batch_count(batch, reduction) for batch in batches)


def regrouped(batches: Sequence[Batch], pad_id: int | None, vocabulary: int, at_least: int = 1) -> Sequence[Batch]:
    """Return the same examples in fewer batches, the longest examples first, or the unchanged batches.

    The batches are not changed if padding on the right could change a result: with padding on the left, with tensors
    other than those in ``FILLERS``, or without a known padding token.

    vocabulary: number of logits at each position, which limits the batch size.  at_least: minimal number of batches,
    one for each process.
    """
    if pad_id is None or not all(mergeable(batch) for batch in batches):
        return batches
    examples = sorted((one for batch in batches for one in unpadded_examples(batch)), key=length, reverse=True)
    most = -(-len(examples) // at_least)
    groups: list[list[Batch]] = []
    for example in examples:
        fits = groups and len(groups[-1]) < most and (len(groups[-1]) + 1) * length(groups[-1][0]) <= MAX_TOKENS
        if fits and logits_of([*groups[-1], example]) * vocabulary * 4 <= MAX_LOGITS:
            groups[-1].append(example)
        else:
            groups.append([example])
    return [padded_batch(group, pad_id) for group in groups]


def causal(batch: Batch) -> bool:
    """Return whether a batch is for a causal model."""
    return batch["labels"].dim() == 2 and "decoder_input_ids" not in batch


def mergeable(batch: Batch) -> bool:
    """Return whether a batch has only known tensors, and padding only on the right and without labels."""
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or not batch.keys() <= FILLERS.keys():
        return False
    first_to_last = bool(mask[:, 0].all()) and bool((mask[:, 1:] <= mask[:, :-1]).all())
    return first_to_last and not (causal(batch) and bool((batch["labels"][mask == 0] != IGNORED).any()))


def unpadded_examples(batch: Batch) -> list[Batch]:
    """Return each example as a batch of one, without padding."""
    of_the_input = {"input_ids", "attention_mask", "token_type_ids"} | ({"labels"} if causal(batch) else set())
    examples = []
    for index, tokens in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        example = {name: value[index : index + 1] for name, value in batch.items()}
        examples.append({name: value[:, :tokens] if name in of_the_input else value for name, value in example.items()})
    return examples


def length(example: Batch) -> int:
    """Return the number of input tokens of a batch of one."""
    return example["input_ids"].shape[1]


def logits_of(examples: Sequence[Batch]) -> int:
    """Return how many positions of the examples' batch get logits: the columns with a loss in any row, in every row."""
    columns = [(targets(example)[0] != IGNORED).nonzero().flatten().tolist() for example in examples]
    return len(examples) * max(1, len(set().union(*columns)))


def padded_batch(examples: Sequence[Batch], pad_id: int) -> Batch:
    """Return one batch of the examples, padded on the right to the longest."""
    found = {}
    for name, filler in FILLERS.items():
        values = [example[name] for example in examples if name in example]
        if values and values[0].dim() == 2:
            longest = max(value.shape[1] for value in values)
            fill = pad_id if filler is None else filler
            values = [pad(value, (0, longest - value.shape[1]), value=fill) for value in values]
        if values:
            found[name] = torch.cat(values)
    return found
