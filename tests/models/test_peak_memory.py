"""Peak memory is that of a run, not of the runs before it in the same process."""

import sys

import pytest
import torch

from lora_one.models.peak_memory import peak_memory, reset_peak_memory


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
