"""Peak memory is that of a run, not of the runs before it in the same process."""

import sys

import pytest
import torch

from lora_one.models.peak_memory import free_bytes, peak_memory, reset_peak_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can reset the peak of a process")
def test_the_peak_is_measured_from_the_last_reset():
    size = 2**28  # bytes
    reset_peak_memory()
    before = peak_memory()
    tensor = torch.ones(size // 4)
    assert peak_memory() >= before + 0.9 * size
    del tensor
    assert peak_memory() >= before + 0.9 * size, "the peak stays"
    reset_peak_memory()
    assert peak_memory() < before + 0.5 * size


def test_memory_that_torch_keeps_for_later_is_free(monkeypatch):
    """After a job of a sweep, the driver counts its cached blocks as used."""
    for name, size in {"mem_get_info": (2, 80), "memory_reserved": 50, "memory_allocated": 10}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device=None, size=size: size)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert free_bytes() == free_bytes(torch.device("cuda", 1)) == 2 + 50 - 10
    assert free_bytes(torch.device("cpu")) > 1000
