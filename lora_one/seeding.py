"""Seeds: one for the run, and separate ones for draws that must not depend on other draws."""

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
    """Return a seed in [0, 2^63) for one purpose, independent of those for other seeds and purposes."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator that depends only on seed and purpose, not on the process or earlier draws."""
    return torch.Generator().manual_seed(seed_for(seed, purpose))
