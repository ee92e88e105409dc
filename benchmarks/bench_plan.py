"""Compare the memory and the traffic that a dry run predicts with what initialisation and training really use.

    python benchmarks/bench_plan.py --shape llama-26m --json bench_plan.json --markdown

A random Llama, LoRA-One on 4 examples, then training steps; every example has the maximum length and a loss at every
token. measured: on a GPU the peak of allocated memory, on a CPU the peak of live tensor bytes, the base included.
Several processes are counted by one: rank 0 of a fake process group, whose operations return without sending anything,
so the values are meaningless, but the tensors and the bytes of the operations are those of a real group.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, Shape, common_arguments, set_threads, write_result
from gpu_init import random_llama
from gpu_train import NO_FILE, PAD, random_examples
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_one.adaptation.selection import adaptation_of
from lora_one.config import RunConfig
from lora_one.data.encode import batches_of
from lora_one.initialization.activations import storage_of
from lora_one.initialization.low_rank_step import StepSettings
from lora_one.initialization.methods import build_init
from lora_one.initialization.solution import Probe
from lora_one.initialization.start import attach_adapters, probe_loss
from lora_one.models import load_model, load_skeleton
from lora_one.records.tracking import Tracker
from lora_one.runs.composition import compose
from lora_one.runs.planned_run import PlannedRun
from lora_one.runs.planned_start import planned_start
from lora_one.runs.scale_plan import planned_bases, title_of
from lora_one.runs.traffic import Traffic
from lora_one.training.job import TrainingJob
from lora_one.training.loop import train

RANK, EXAMPLES, STEPS, MANY = 4, 4, 2, 4
KINDS = {"allreduce_": "all_reduced", "reduce_": "reduced", "broadcast_": "broadcast", "_allgather_base_": "gathered"}
FIGURES = {
    "predicted": ("predicted MB", "{:.1f}"),
    "measured": ("measured MB", "{:.1f}"),
    "ratio": ("predicted / measured", "{:.3f}"),
    "ratio_without_base": ("without the base", "{:.3f}"),
    "sent_predicted": ("predicted MB of operations", "{:.3f}"),
    "sent_measured": ("measured", "{:.3f}"),
}


class Counter(TorchDispatchMode):
    """Count the live bytes of a model and of the tensors made since, and the bytes of collective operations.

    The sizes of all live storages are read, because FSDP frees a storage by resizing it. A part of a sharded model
    counts as it is, because its storage is that of the whole file.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known: dict[int, tuple[int, int | None]] = {}  # address of a storage -> a weak pointer, and a fixed size
        for weight in model.parameters():
            storage = storage_of(weight)
            self.known[storage._cdata] = (storage._weak_ref(), local(weight).nbytes)
        self.peak = 0
        self.sent = dict.fromkeys(KINDS.values(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" and func._opname in KINDS:
            self.sent[KINDS[func._opname]] += sum(tensor.nbytes for tensor in finite(func._opname, args))
        changed = "copy" in func._opname  # into a storage that FSDP has resized
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = storage_of(tensor)
                if storage._cdata not in self.known:
                    self.known[storage._cdata] = (storage._weak_ref(), None)
                    changed = True
        if changed:
            self.peak = max(self.peak, self.live())
        return result

    def live(self) -> int:
        total = 0
        for key, (pointer, size) in list(self.known.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(pointer)
            if storage is None:
                torch.UntypedStorage._free_weak_ref(pointer)
                del self.known[key]
            else:
                total += storage.nbytes() if size is None else size
        return total


def finite(operation: str, arguments: tuple) -> list[torch.Tensor]:
    """Return the tensors of a collective operation, after replacing what no other process has sent."""
    tensors = [part for part in tree_leaves(arguments[0]) if isinstance(part, torch.Tensor)]
    for tensor in tensors:
        if operation == "_allgather_base_":
            tensor.view(-1, arguments[1].numel()).copy_(arguments[1].clone().view(1, -1))
        elif operation == "broadcast_" and tensor.is_floating_point():
            tensor.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1.0, 1.0)
    return tensors


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Unsummed(DistributedDataParallel):
    """DDP that counts its gradients in ``counter`` instead of adding those of other processes, of which none exists."""

    counter: Counter | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_comm_hook(None, self.counted)

    @classmethod
    def counted(cls, _: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if cls.counter is not None:
            cls.counter.sent["all_reduced"] += bucket.buffer().nbytes
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done


def settings(shape: Shape, folder: Path, processes: int, *, bf16: bool, sharded: bool | int) -> RunConfig:
    keys = [f"model.name={folder}", "model=llama", "dataset=arithmetic", "init=lora_one", "wandb.mode=disabled"]
    keys += [f"peft.lora_r={RANK}", "init.bsz=1", f"init.iters={EXAMPLES}"]
    keys += ["dataset.accuracy_examples=0", f"model.max_length={shape.length}", f"model.bf16={bf16}"]
    keys += ["init.scale=stable"] if processes > 1 else []  # a search needs losses that are real
    keys += [f"model.real_batch_size={2 * processes}", "model.per_device_batch_size=1", f"model.sharded={sharded}"]
    return compose(keys)


def planned_of(run: RunConfig) -> PlannedRun:
    """Return the plan of the run as it is."""
    skeleton = load_skeleton(run.model.name)
    adaptation = adaptation_of(run, NO_FILE)
    layers, trainable = adaptation.layers(skeleton, run.init), adaptation.trainable_parameters(skeleton)
    found = planned_bases(run, skeleton, layers, trainable, EXAMPLES, None)
    return found[title_of(run.model)]


def start(base: nn.Module, run: RunConfig, shape: Shape) -> nn.Module:
    """Attach adapters as a run does."""
    rows = run.init.bsz or run.model.per_device_batch_size
    batches = batches_of(random_examples(shape, run.init.examples_wanted), rows, PAD)
    probe = Probe(batches, "example", StepSettings.of(run.init, checkpointing=False))
    model, _ = attach_adapters(base, adaptation_of(run, NO_FILE), build_init(run.init), probe, seed=0)
    if run.init.search_from is None:
        probe_loss(model, probe)
    return model


def training(model: nn.Module, run: RunConfig, shape: Shape) -> None:
    """Do ``STEPS`` optimizer steps as a run does."""
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(Path(folder) / "metrics.jsonl")
        examples = random_examples(shape, STEPS * run.model.real_batch_size)
        job = TrainingJob(
            run, adaptation_of(run, NO_FILE), checkpoints=Path(folder) / "points", pad_id=PAD, tracker=tracker
        )
        train(model, examples, job)


def measured(model: nn.Module, work: Callable[[], Any]) -> tuple[int, dict[str, int]]:
    """Return the peak of memory during ``work``, with the model, and the bytes of its collective operations."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated(), {}
    Unsummed.counter = counter = Counter(model)
    with counter:
        work()
    return counter.peak, counter.sent


def compared(planned: PlannedRun, processes: int, predicted: float, sent: Traffic, found: tuple) -> dict[str, Any]:
    """Return a row: megabytes predicted and measured, and bytes of collective operations by kind."""
    peak, operations = found
    base = planned.resident(processes) - planned.copies
    sent = sent if processes > 1 else Traffic()
    row = {"predicted": predicted / 1e6, "measured": peak / 1e6, "ratio": predicted / peak}
    row |= {"ratio_without_base": (predicted - base) / (peak - base)}
    row |= {"sent_predicted": sum(vars(sent).values()) / 1e6, "sent_measured": sum(operations.values()) / 1e6}
    return row | {"operations_predicted": asdict(sent), "operations_measured": operations}


def cases_of(base: nn.Module, run: RunConfig, shape: Shape, processes: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the cases of one base on a number of processes: each way to store gradients, and training."""

    def initialisation(memory: str, rows: int) -> dict[str, Any]:
        at = replace(run, init=replace(run.init, memory=memory, bsz=rows, iters=EXAMPLES // rows))
        planned = planned_of(at)
        plan = planned_start(planned, processes, memory, ())
        found = measured(base, lambda: start(base, at, shape).unload())
        return compared(planned, processes, plan.memory, plan.sent, found)

    def trained() -> dict[str, Any]:
        random = build_init(compose(["init=default"]).init)
        model, _ = attach_adapters(base, adaptation_of(run, NO_FILE), random, None, seed=0)
        found = measured(model, lambda: training(model, run, shape))
        model.unload()
        planned = planned_of(run)
        sent = planned.begin_traffic() + planned.step_traffic(processes).times(STEPS)
        return compared(planned, processes, planned.training_memory(processes), sent, found)

    return {
        "init, every gradient on the device": lambda: initialisation("fast", 1),
        "init, sketch": lambda: initialisation("low", 1),
        "init, layer by layer": lambda: initialisation("low", EXAMPLES),
        "training": trained,
    }


def fake_group(processes: int) -> None:
    """Make this process rank 0 of a group that does not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    torch.nn.parallel.DistributedDataParallel = Unsummed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser, shape="llama-26m", repeats=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--skip", nargs="*", default=[], metavar="WORD", help="leave out bases with WORD in their name")
    chosen = parser.parse_args(arguments)
    set_threads(chosen)
    shape, rows, dtype = SHAPES[chosen.shape], [], getattr(torch, chosen.dtype)
    bases = {"one process": (1, False), f"{MANY} processes": (MANY, False)}
    bases |= {f"sharded over {MANY}": (MANY, True), f"sharded over 2 of {MANY}": (MANY, 2)}
    with tempfile.TemporaryDirectory() as folder:
        random_llama(shape, "cpu", dtype).save_pretrained(folder)
        for title, (processes, sharded) in bases.items():
            if any(word in title for word in chosen.skip):
                continue
            if processes > 1 and not dist.is_initialized():
                fake_group(processes)
            run = settings(shape, Path(folder), processes, bf16=dtype == torch.bfloat16, sharded=sharded)
            options = {"dtype": "bf16" if run.model.bf16 else "fp32", "where": chosen.device}
            shards = run.model.shards(processes)
            base = load_model(folder, **options, shards=shards, copies=processes // shards if shards > 1 else 1)
            for name, case in cases_of(base, run, shape, processes).items():
                rows.append({"name": f"{title}: {name}"} | case())
                print({key: rows[-1][key] for key in ("name", *FIGURES)}, flush=True)
    result = {"settings": {"shape": chosen.shape, "dtype": chosen.dtype}, "rows": rows, "ratios": {}}
    write_result(chosen, result, FIGURES)


if __name__ == "__main__":
    main()
