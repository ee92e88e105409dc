"""Draw the initialisation examples, for the one-step gradient and for PEFT's data-driven methods."""

from collections.abc import Sequence

import torch

from lora_one.config import RunConfig
from lora_one.data.encode import Encoded, Encoder, batches_of
from lora_one.data.stored import chosen
from lora_one.errors import UsageError
from lora_one.losses import Batch
from lora_one.seeding import generator_for
from lora_one.types import Example


def probe_batches(run: RunConfig, texts: Sequence[Example], encoder: Encoder) -> tuple[list[Batch], list[Batch] | None]:
    """Return batches of the initialisation examples, and of those for the search for the scale.

    All are drawn without replacement from the training texts with init.seed. The second list is None if the search uses
    the same examples. With ``init.search_examples=null`` the search uses as many further examples as the gradient, and
    at least 32 with a classification head; if there are fewer, all others, and if these are fewer than the
    gradient's, the gradient's. An example without an answer token within ``init.max_length`` is replaced by the next.
    Raises UsageError: more examples are needed than exist, or than have an answer token.
    """
    init = run.init
    wanted, further = init.examples_wanted, run.further_examples
    refuse_too_few(run, len(texts))
    own = len(texts) if wanted is None else wanted
    needed = own + init.required_further
    max_length = init.max_length or run.model.max_length
    drawn = draw(texts, own + further, max_length, run.init_seed, encoder)
    limit = "model.max_length" if init.max_length is None else "init.max_length"
    if len(drawn) < needed and (wanted is not None or needed > own):
        raise UsageError(
            f"the initialisation needs {needed} examples, but only {len(drawn)} of the {len(texts)} training examples "
            f"have an answer token within {limit}={max_length}: raise it, or lower init.iters or init.search_examples"
        )
    size = init.bsz or run.model.per_device_batch_size
    others = drawn[own:] if len(drawn) - own >= min(own, further) else []
    return batches_of(drawn[:own], size, encoder.pad_id), batches_of(others, size, encoder.pad_id) or None


def refuse_too_few(run: RunConfig, examples: int) -> None:
    """Raise UsageError if the initialisation or the curvature needs more examples than the training data has."""
    init, asked = run.init, run.wandb.curvature_examples
    if asked > examples:
        raise UsageError(
            f"wandb.curvature_examples={asked} exceeds the number of training examples, {examples}: lower it"
        )
    if not init.needs_examples:
        return
    own = examples if init.examples_wanted is None else init.examples_wanted
    needed = own + init.required_further
    if needed > examples:
        keys = f"init.sub_size={own}" if init.do_subsampling else f"init.bsz x init.iters={own}"
        keys += f" + init.search_examples={init.further_examples}" if needed > own else ""
        raise UsageError(f"{keys} exceeds the number of training examples, {examples}: lower it")


def draw(
    texts: Sequence[Example],
    wanted: int,
    max_length: int,
    seed: int,
    encoder: Encoder,
    purpose: str = "initialisation examples",
) -> list[Encoded]:
    """Encode up to ``wanted`` examples in an order drawn by the seed, another one for each purpose.

    Raises RunError: none has an answer token.
    """
    order = torch.randperm(len(texts), generator=generator_for(seed, purpose))
    drawn: list[Encoded] = []
    while len(order) and len(drawn) < wanted:
        missing = wanted - len(drawn)
        encoded, _ = encoder.encode(list(chosen(texts, order[:missing])), max_length)
        order = order[missing:]
        drawn += encoded
    if not drawn:
        raise encoder.nothing_left(texts, max_length)
    return drawn
