"""The plan of a run on a number of processes and a kind of hardware, without loading or starting anything."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from lora_one.config import RunConfig
from lora_one.config.hardware import Hardware
from lora_one.config.rules import check
from lora_one.config.schemas import ModelConfig
from lora_one.errors import UsageError
from lora_one.reports.table import markdown
from lora_one.runs.memory_forecast import activation_bytes, groups_of_inputs
from lora_one.runs.planned_run import PlannedRun
from lora_one.runs.planned_start import Groups, planned_start
from lora_one.training.schedule import accumulation_steps, micro_batch, total_steps

MODES = ("fast", "low", "auto")  # of init.memory


def planned_bases(
    run: RunConfig,
    skeleton: nn.Module,
    layers: dict[str, nn.Module],
    trainable: int,
    examples: int,
    hardware: Hardware | None,
) -> dict[str, PlannedRun | str]:
    """Return the run with each variant of its base, by its name; a variant that is not possible is its error."""

    @cache
    def kept(length: int, dtype: torch.dtype) -> int:
        model, names = run.model, list(layers) or None
        return activation_bytes(
            skeleton.config, model.type, names, 1, length, dtype, checkpointing=model.gradient_checkpointing
        )

    wide = [{"quantization": None, "bf16": True}, {"quantization": None, "bf16": False}]
    variants = [{"sharded": False} | each for each in (*wide, {"quantization": run.model.quantization or "nf4"})]
    variants += [{"sharded": shards} | each for shards in sharings(run.model, hardware) for each in wide]
    found: dict[str, PlannedRun | str] = {}
    for changes in variants:
        changed = replace(run, model=replace(run.model, **changes))
        name = title_of(changed.model)
        try:
            check(changed)
            found[name] = PlannedRun(changed, skeleton, layers, trainable, examples, kept, hardware)
        except UsageError as error:
            found[name] = str(error)
    return found


def sharings(model: ModelConfig, hardware: Hardware | None) -> list[bool | int]:
    """Return the values of ``model.sharded`` to plan for: all processes, and those of the run or of a node."""
    own = model.sharded if not isinstance(model.sharded, bool) else hardware.devices_per_node if hardware else 1
    return [True] if own == 1 else [True, own]


def title_of(model: ModelConfig) -> str:
    """Return the name of a variant of the base, such as "sharded by 8, bf16"."""
    shared = "whole" if not model.sharded else "sharded" if model.sharded is True else f"sharded by {model.sharded}"
    return f"{shared}, {model.quantization or ('bf16' if model.bf16 else 'fp32')}"


def scale_plan(bases: dict[str, PlannedRun | str], processes: int) -> str:
    """Return a table with a row for each base: what each process needs, sends and takes, and where it fits; then notes.

    bases: see ``planned_bases``.
    """
    possible = {name: planned for name, planned in bases.items() if isinstance(planned, PlannedRun)}
    one = next(iter(possible.values()))
    init, model, hardware = one.run.init, one.run.model, one.hardware
    groups = groups_of_inputs(one.skeleton.config, model.type, one.layers) if one.layers and init.needs_moments else ()
    modes = modes_of(one)
    titles = ["base", "training", *(f"init {mode}".strip() for mode in modes), "sent/step", "sent once"]
    titles += ["step", "init", "run", "fits on"] if hardware else []
    rows = [row(name, planned, processes, modes, groups) for name, planned in possible.items()]
    lines = [markdown([titles, *rows]), *notes(one, processes)]
    lines += [f"{name}: not possible: {error}" for name, error in bases.items() if isinstance(error, str)]
    return "\n".join(lines)


def modes_of(planned: PlannedRun) -> list[str]:
    """Return the values of init.memory; [""]: the method has no such setting, []: it uses no examples."""
    init = planned.run.init
    if not planned.layers or not init.needs_examples:
        return []
    return [mode for mode in MODES if mode != "auto" or planned.hardware] if hasattr(init, "memory") else [""]


def row(name: str, planned: PlannedRun, processes: int, modes: Sequence[str], groups: Groups) -> list[str]:
    """Return one row of the table: GB of each process, GB that it sends, seconds, hours, and the number of devices."""
    hardware, model = planned.hardware, planned.run.model
    fits = [smallest(planned, groups)] if hardware else []
    if not possible(model, processes):  # but it may be with more of them
        return [name, *["-"] * (3 + len(modes) + 3 * bool(hardware)), *fits]
    starts = {mode: planned_start(planned, processes, mode or None, groups) for mode in modes}
    own = starts.get(getattr(planned.run.init, "memory", ""))
    cells = [name, gigabytes(planned.training_memory(processes))]
    cells += [
        gigabytes(start.memory) + (f" ({start.place})" if mode == "auto" else "") for mode, start in starts.items()
    ]
    cells.append(gigabytes(planned.sent(planned.step_traffic(processes), processes)))
    begin = planned.sent(planned.begin_traffic(), processes)
    known = own is not None or not (modes or unpredicted(planned))
    cells.append(gigabytes(begin + (planned.sent(own.sent, processes) if own else 0)) if known else "-")
    if hardware:
        step, start = planned.step_seconds(processes), own.seconds if own else 0.0
        whole = start + begin / hardware.link(processes) + step * total_steps(planned.examples, model)
        init = "-" if unpredicted(planned) else f"{short(start)} s"
        cells += [f"{short(step)} s", init, f"{short(whole / 3600)} h", *fits]
    return cells


def unpredicted(planned: PlannedRun) -> bool:
    """Return whether the initialisation is not predicted: that of a gradient step in the weights themselves."""
    return not planned.layers and planned.run.init.needs_examples


def possible(model: ModelConfig, processes: int) -> bool:
    """Return whether a sharded base can be divided over this number of processes."""
    return not model.sharded or (processes > 1 and processes % model.shards(processes) == 0)


def smallest(planned: PlannedRun, groups: Groups) -> str:
    """Return in words the smallest number of devices whose memory is enough for training and initialisation."""
    model = planned.run.model
    modes = modes_of(planned)
    mode = getattr(planned.run.init, "memory", None)
    for processes in range(1, min(model.real_batch_size, planned.examples) + 1):
        if model.real_batch_size % processes == 0 and possible(model, processes):
            needed = planned.training_memory(processes)
            if modes:
                needed = max(needed, planned_start(planned, processes, mode, groups).memory)
            if needed <= planned.hardware.room:
                return f"{processes}"
    return "none"


def notes(planned: PlannedRun, processes: int) -> list[str]:
    """Return what a reader of the table must know about it."""
    model, init = planned.run.model, planned.run.init
    lines = [
        f"GB and seconds of one process; every example with {model.max_length} tokens, "
        f"{micro_batch(model, processes)} at once, {accumulation_steps(model, processes)} times for each step"
    ]
    if unpredicted(planned):
        lines.append(
            f"the initialisation by {init.title} is not predicted: each process keeps the weights of the target layers "
            "twice, and their gradients in fp32"
        )
    if modes_of(planned) and init.needs_gradient:
        own = init.memory
        lines.append(
            f"sent once{' and init' if planned.hardware else ''}: with init.memory={own}, without the time of the "
            "low-rank steps"
        )
        wanted = init.examples_wanted or planned.examples
        batches = -(-wanted // (init.bsz or model.per_device_batch_size))
        if 1 < batches < processes:
            lines.append(f"init: {batches} batches of examples, so {processes - batches} of the processes only wait")
    return lines


def gigabytes(size: float) -> str:
    return f"{short(size / 1e9)} GB"


def short(value: float) -> str:
    """Return a number with three digits.

    >>> short(0.12345), short(12.345), short(999.6), short(1234.5)
    ('0.123', '12.3', '1,000', '1,234')
    """
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"
