"""Seeds: one for the run, and one of its own for everything that must not depend on what else was drawn."""

import hashlib
import random

import numpy
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on seed and purpose alone, whatever was drawn before, in any process."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
