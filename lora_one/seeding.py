"""Seeds: one for the run, and one of its own for everything that must not depend on what else was drawn."""

import hashlib
import random

import numpy
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_for(seed: int, purpose: str) -> int:
    """A seed in [0, 2^63) for one purpose; those of another seed or another purpose are independent of it."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on seed and purpose alone, whatever was drawn before, in any process."""
    return torch.Generator().manual_seed(seed_for(seed, purpose))
