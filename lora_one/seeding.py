"""Seeds: one for the run, and separate ones for draws that must not depend on other draws."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed as ``seed_everything``, and restore the states of all generators at the end of the block."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    seed_everything(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)
        else:
            torch.cuda.manual_seed_all(torch.initial_seed())  # as torch.manual_seed had done it


def seed_for(seed: int, purpose: str) -> int:
    """Return a seed in [0, 2^63) for one purpose, independent of those for other seeds and purposes."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator that depends only on seed and purpose, not on the process or earlier draws."""
    return torch.Generator().manual_seed(seed_for(seed, purpose))
