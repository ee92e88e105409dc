"""Several processes: which one handles which batch and which layer. With one process every function is a no-op."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from lora_one.errors import RunError, UsageError
from lora_one.peers import meet_peers
from lora_one.progress import tasks_of_srun

SILENCE_S = 300.0  # seconds
JOIN_S = 600.0  # seconds in which all processes must have started
WAITING = timedelta(hours=24)  # of a collective operation: one process may encode or merge while the others wait
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's rank among ``count``."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Processes":
        """Return the processes of torch.distributed; one process if it is not initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @classmethod
    def started(cls, silence_s: float = SILENCE_S) -> "Processes":
        """Join the processes of a launcher (torchrun, accelerate launch; WORLD_SIZE is set) or the tasks of one srun.

        Without a GPU the backend is gloo; by default, accelerate would start every process as rank 0 of 1.
        silence_s: seconds without a sign of life after which another process is lost, see ``lora_one.peers``. It
        replaces the time-outs of collective operations, which would end processes that wait for the only one at work.
        Raises UsageError: the launcher enables FSDP or DeepSpeed.  RunError: another process has not started.
        """
        refuse_sharding(os.environ)
        take_slurm_tasks(os.environ)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            from accelerate import PartialState

            store, rank, count = joined()
            group = {"store": store, "rank": rank, "world_size": count, "timeout": WAITING}
            PartialState(cpu=not torch.cuda.is_available(), **group)
            meet_peers(dist.PrefixStore("peers", store.clone()), rank, count, silence_s)
        return cls.current()

    def per_node(self) -> int | None:
        """Return the number of processes on each node; None: the nodes differ, or the launcher does not tell it."""
        sizes = set(self.gathered(os.environ.get("LOCAL_WORLD_SIZE")))
        return int(sizes.pop()) if len(sizes) == 1 and None not in sizes else None

    def meet(self) -> None:
        """Wait for the other processes."""
        if self.count > 1:
            dist.barrier()

    def share(self, items: Sequence[T]) -> Iterator[tuple[T, float]]:
        """Yield this process's items with weight 1, padded with items of weight 0 to the same number on all processes.

        The passes of a sharded model are collective, so every process must run equally many.
        """
        for start in range(0, len(items), self.count):
            mine = start + self.rank
            yield (items[mine], 1.0) if mine < len(items) else (items[0], 0.0)

    def by_turns(self, names: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yield (owner, name) for each layer: the owner is assigned in round-robin order."""
        return ((index % self.count, name) for index, name in enumerate(names))

    def sum_to(self, owner: int, tensor: Tensor) -> Tensor:
        """Return the sum over processes; it is complete only on the owner."""
        return self._together(tensor, lambda travelling: dist.reduce(travelling, owner))

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over processes, on every process."""
        return self._together(tensor, dist.all_reduce)

    def from_owner(self, owner: int, tensor: Tensor) -> Tensor:
        """Return the owner's values, on every process."""
        return self._together(tensor, lambda travelling: dist.broadcast(travelling, owner))

    def _together(self, tensor: Tensor, operation: Callable[[Tensor], object]) -> Tensor:
        """Return the tensor after an in-place collective operation; with one process, return it unchanged.

        NCCL needs tensors on the GPU; other backends take a tensor on its own device.
        """
        if self.count == 1:
            return tensor
        travelling = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        operation(travelling)
        return travelling.to(tensor.device)

    def refuse_together(self, check: Callable[[], None]) -> None:
        """Call a check on every process; if one of them raises UsageError, raise that of the first one on all."""
        message = ""
        try:
            check()
        except UsageError as error:
            message = str(error)
        for refused in filter(None, self.gathered(message)):
            raise UsageError(refused)

    def total(self, value: float) -> float:
        """Return the sum of every process's value, on every process."""
        return sum(self.gathered(value))

    def gathered(self, value: T) -> list[T]:
        """Return every process's value in order of rank, on every process, so that all can make the same decision."""
        if self.count == 1:
            return [value]
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value)
        return values


def refuse_sharding(environment: Mapping[str, str]) -> None:
    """Raise UsageError if accelerate is told to shard the model, which it would do only after the initialisation.

    The initialisation would then need the whole model on each GPU, and the first process could not save the adapter.
    """
    for name in ("FSDP", "DeepSpeed"):
        if environment.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true":
            raise UsageError(
                f"accelerate's configuration enables {name}, which is not supported: use "
                "scripts/accelerate/sharded.yaml with model.sharded=true (or node: within each node) instead, which "
                "shards the base while it is loaded"
            )


def joined() -> tuple[Any, int, int]:
    """Return the store of all processes, this one's rank, and their number, once all have started.

    Raises RunError: one of them has not started within JOIN_S.
    """
    within, count = timedelta(seconds=JOIN_S), int(os.environ["WORLD_SIZE"])
    started: dict[int, str] = {}  # rank -> its key in the store; empty: the store was not reached
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=within))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(count):
            # torchrun keeps its store when it restarts the processes of one machine (torch 2.13), and those would
            # read the addresses of the dead ones in it
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        started = {other: f"started/{other}" for other in range(count)}
        store.set(started[rank], "")
        store.wait(list(started.values()), within)
    except dist.DistError as error:
        missing = ", ".join(str(other) for other, key in started.items() if not store.check([key]))
        others = f"process {missing}" if missing else "the others"
        raise RunError(
            f"not all of the {count} processes have started within {JOIN_S / 60:g} minutes: what {others} printed "
            "says why; the same command starts them again"
        ) from error
    return store, rank, count


def take_slurm_tasks(environment: MutableMapping[str, str]) -> None:
    """Set torch's variables from those of an srun; no change for one task, or if a launcher has set WORLD_SIZE.

    The port is computed from job and step: all tasks get the same one, and two steps on a machine different ones.
    """
    if "WORLD_SIZE" in environment or tasks_of_srun(environment) < 2:
        return
    first = "127.0.0.1"
    if int(environment["SLURM_STEP_NUM_NODES"]) > 1:
        listed = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
        first = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()[0]
    step = 64 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    tasks = re.fullmatch(r"(\d+)(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if tasks:  # such as 4(x2); 4(x2),3 if the nodes differ
        environment["LOCAL_WORLD_SIZE"] = tasks[1]
    environment.update(
        RANK=environment["SLURM_PROCID"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        MASTER_ADDR=first,
        MASTER_PORT=str(20000 + step % 20000),
    )
