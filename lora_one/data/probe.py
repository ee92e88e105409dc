"""The examples that an initialisation looks at: the one-step gradient, and PEFT's own data-driven methods."""

import torch

from lora_one.config import RunConfig
from lora_one.config.schemas import ProbedInit
from lora_one.data.encode import Encoded, Encoder, batches_of
from lora_one.errors import UsageError
from lora_one.losses import Batch
from lora_one.seeding import generator_for
from lora_one.types import Example


def probe_batches(run: RunConfig, texts: list[Example], encoder: Encoder) -> tuple[list[Batch], list[Batch] | None]:
    """Return batches of the initialisation examples and, with ``init.search_examples``, of further ones.

    All are drawn without replacement from the training texts by init.seed. An example with no answer token left at
    ``init.max_length`` is skipped and the next one drawn.
    Raises UsageError: more examples wanted than there are, or than have an answer token.
    """
    init = run.init
    wanted = examples_wanted(init)
    further = getattr(init, "search_examples", None) or 0
    together = (len(texts) if wanted is None else wanted) + further
    if together > len(texts):
        keys = f"init.sub_size={wanted}" if init.do_subsampling else f"init.bsz x init.iters={wanted}"
        keys += f" + init.search_examples={further}" if further else ""
        raise UsageError(f"{keys} exceeds the {len(texts)} training examples: lower it")
    max_length = init.max_length or run.model.max_length
    drawn = draw(texts, together, max_length, init_seed(run), encoder)
    if len(drawn) < together and (wanted is not None or further):
        raise UsageError(
            f"the initialisation wants {together} examples, but only {len(drawn)} of {len(texts)} have an answer "
            f"token within max_length={max_length}: raise init.max_length or take fewer"
        )
    size = init.bsz or run.model.per_device_batch_size
    own, others = drawn[: len(drawn) - further], drawn[len(drawn) - further :]
    return batches_of(own, size, encoder.pad_id), batches_of(others, size, encoder.pad_id) or None


def draw(texts: list[Example], wanted: int, max_length: int, seed: int, encoder: Encoder) -> list[Encoded]:
    """Encode up to ``wanted`` examples in an order drawn by the seed. Raises RunError: none has an answer token."""
    order = torch.randperm(len(texts), generator=generator_for(seed, "initialisation examples")).tolist()
    drawn: list[Encoded] = []
    while order and len(drawn) < wanted:
        missing = wanted - len(drawn)
        chosen, order = order[:missing], order[missing:]
        encoded, _ = encoder.encode([texts[i] for i in chosen], max_length)
        drawn += encoded
    if not drawn:
        raise encoder.nothing_left(texts, max_length)
    return drawn


def examples_wanted(init: ProbedInit) -> int | None:
    """None: the whole training set."""
    if init.do_subsampling:
        return init.sub_size
    return None if init.bsz is None else init.bsz * init.iters


def init_seed(run: RunConfig) -> int:
    return run.seed if run.init.seed is None else run.init.seed
