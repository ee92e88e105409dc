"""Memory of a run: free and freed, and its peak, on a GPU that of torch's tensors, otherwise of the whole process."""

import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

PROCESS = Path("/proc/self")  # of Linux


def free_memory() -> None:
    """Free the model of an earlier run in this process, which its trainer and it keep by references to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device | None = None) -> int:
    """Return the free memory of a device, by default the one that models are loaded to.

    On a GPU, memory that torch has freed but keeps for later tensors is free too; the driver counts it as used.
    """
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available


def reset_peak_memory() -> None:
    """Start to measure at the present use; where the system cannot, the peak is that since the process started."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the largest number of bytes in use since the last reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, StopIteration):
        lines = (PROCESS / "status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
