"""Several processes as one: who takes which batch and which layer. With one process everything is a no-op."""

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from lora_one.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's rank among ``count``."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Processes":
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @classmethod
    def started(cls) -> "Processes":
        """Join the processes of a launcher (torchrun, accelerate launch), which says in WORLD_SIZE how many there are,
        or the tasks of one srun.

        Without a GPU they meet through gloo: accelerate by itself would leave each the first of one.
        Raises UsageError: the launcher asks for FSDP or DeepSpeed.
        """
        refuse_sharding(os.environ)
        take_slurm_tasks(os.environ)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available())
        return cls.current()

    def meet(self) -> None:
        """Wait for the others."""
        if self.count > 1:
            dist.barrier()

    def share(self, items: Sequence[T]) -> Iterator[tuple[T, float]]:
        """This process's items, each with weight 1; every process gets as many, the missing ones with weight 0.

        Sharded models run their passes together, so no process may do fewer than another.
        """
        for start in range(0, len(items), self.count):
            mine = start + self.rank
            yield (items[mine], 1.0) if mine < len(items) else (items[0], 0.0)

    def by_turns(self, names: Sequence[str]) -> Iterator[tuple[int, str]]:
        """(owner, name): the layers spread over the processes."""
        return ((index % self.count, name) for index, name in enumerate(names))

    def sum_to(self, owner: int, tensor: Tensor) -> Tensor:
        """The sum over processes, complete at its owner."""
        return self._together(tensor, lambda travelling: dist.reduce(travelling, owner))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, everywhere."""
        return self._together(tensor, dist.all_reduce)

    def from_owner(self, owner: int, tensor: Tensor) -> Tensor:
        """The owner's values, everywhere."""
        return self._together(tensor, lambda travelling: dist.broadcast(travelling, owner))

    def _together(self, tensor: Tensor, operation: Callable[[Tensor], object]) -> Tensor:
        """The tensor after an in-place operation of all processes; untouched where there is one.

        NCCL moves only what lies on the GPU; others take a tensor where it is.
        """
        if self.count == 1:
            return tensor
        travelling = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        operation(travelling)
        return travelling.to(tensor.device)

    def total(self, value: float) -> float:
        return sum(self.gathered(value))

    def gathered(self, value: T) -> list[T]:
        """Every process's value, in order of rank, everywhere: what all must decide alike is decided on these."""
        if self.count == 1:
            return [value]
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value)
        return values


def refuse_sharding(environment: Mapping[str, str]) -> None:
    """Raises UsageError: accelerate was told to shard the model, which it would do after the start was taken.

    Then the start has needed the whole model on each GPU, and the first process can write no adapter alone.
    """
    for name in ("FSDP", "DeepSpeed"):
        if environment.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true":
            raise UsageError(
                f"accelerate's configuration asks for {name}, which is not built: take "
                "scripts/accelerate/sharded.yaml with model.sharded=true, which shards the base as it is loaded"
            )


def take_slurm_tasks(environment: MutableMapping[str, str]) -> None:
    """Say the tasks of an srun in torch's variables; nothing changes for one task, or where a launcher has spoken.

    The port follows from the job and the step, so that all tasks know it and two steps on a machine do not meet.
    """
    if "WORLD_SIZE" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    first = "127.0.0.1"
    if int(environment["SLURM_STEP_NUM_NODES"]) > 1:
        listed = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
        first = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()[0]
    step = 64 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    environment.update(
        RANK=environment["SLURM_PROCID"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        MASTER_ADDR=first,
        MASTER_PORT=str(20000 + step % 20000),
    )
