"""The part ``train`` of gpu.py: tokens per second and peak memory, compared with plain Trainer + PEFT.

Random weights, random examples of one length, LoRA at its default start. Every optimizer step is over 4 examples, in
micro-batches of the size that the row names. The time of a step is taken when its loss is logged, which waits for the
GPU in both cases; the first steps are left out.
"""

import argparse
import contextlib
import io
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import SHAPES, Shape
from gpu_init import TARGETS, random_llama
from peft import LoraConfig, get_peft_model
from rows import GIB, Row, Table, freed
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lora_one.adaptation.selection import adaptation_of
from lora_one.adaptation.wrapping import quiet_peft
from lora_one.config import RunConfig
from lora_one.data.encode import Encoded
from lora_one.initialization.methods import build_init
from lora_one.initialization.start import attach_adapters
from lora_one.records.tracking import Tracker
from lora_one.runs.composition import compose
from lora_one.training.job import TrainingJob
from lora_one.training.loop import train

NO_FILE = Path("no run")  # initial factors that do not exist
WARM, STEPS, GLOBAL, PAD = 3, 12, 4, 0


class Stamps(Tracker):
    """A tracker that keeps the losses of all steps, and the times at which they were logged."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.times: list[float] = []
        self.losses: list[float] = []

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        super().log(step, metrics)
        if "loss" in metrics:
            self.times.append(time.perf_counter())
            self.losses.append(metrics["loss"])


class Stamper(TrainerCallback):
    """The same as a callback of the plain Trainer."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if "loss" in (logs or {}):
            self.times.append(time.perf_counter())
            self.losses.append(logs["loss"])


def main(chosen: argparse.Namespace, _: str) -> int:
    """Measure micro-batches of 1, 4 and 2 examples, and lora_one also with packing and with checkpointing."""
    shape = SHAPES["small" if chosen.small else "llama2-7b"]
    rank = 4 if chosen.small else 8
    settings = {"shape": "small" if chosen.small else "llama2-7b", "rank": rank, "length": shape.length}
    settings |= {"steps": STEPS, "warm-up steps": WARM, "global batch": GLOBAL, "dtype": "bfloat16"}
    table = Table(chosen.out, "train", chosen.device, settings, chosen.seconds)
    base = random_llama(shape, chosen.device, torch.bfloat16)
    examples = random_examples(shape, GLOBAL * (WARM + STEPS))
    for size in (1, 4, 2):
        table.row(f"ours, {size} at a time", partial(ours, base, examples, shape, rank, size))
        table.row(f"Trainer + PEFT, {size} at a time", partial(plain, base, examples, shape, rank, size))
        table.write(ratios=ratios(table))
    table.row("ours, 4 packed", partial(ours, base, examples, shape, rank, 4, packing=True))
    checkpointing = partial(ours, base, examples, shape, rank, 4, gradient_checkpointing=True)
    table.row("ours, 4 at a time, checkpointing", checkpointing)
    table.write(ratios=ratios(table))
    return int(any("error" in row for row in table.rows))


def random_examples(shape: Shape, count: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, shape.vocabulary, (count, shape.length), generator=generator).tolist()
    return [Encoded(ids, list(ids)) for ids in rows]


def run_of(shape: Shape, rank: int, size: int, **changes: Any) -> RunConfig:
    keys = ["dataset=arithmetic", "model=llama", "model.name=bundled/tiny", "init=default", "wandb.mode=disabled"]
    keys += [f"peft.lora_r={rank}", f"peft.lora_alpha={2 * rank}", f"model.max_length={shape.length}"]
    keys += [f"model.real_batch_size={GLOBAL}", f"model.per_device_batch_size={size}", "model.bf16=true"]
    keys += ["model.logging_steps=1", "model.epochs=1", "model.learning_rate=1e-5"]
    run = compose(keys)
    return replace(run, model=replace(run.model, **changes))


def ours(base: nn.Module, examples: list[Encoded], shape: Shape, rank: int, size: int, **changes: Any) -> Row:
    run = run_of(shape, rank, size, **changes)
    model, _ = attach_adapters(base, adaptation_of(run, NO_FILE), build_init(run.init), None, seed=0)
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            stamps = Stamps(Path(folder) / "metrics.jsonl")
            begun()
            points = Path(folder) / "checkpoints"
            train(
                model,
                examples,
                TrainingJob(run, adaptation_of(run, NO_FILE), checkpoints=points, pad_id=PAD, tracker=stamps),
            )
            return measured(stamps, shape)
    finally:
        model.unload()
        base.requires_grad_(False)


def plain(base: nn.Module, examples: list[Encoded], shape: Shape, rank: int, size: int) -> Row:
    """Train with the Trainer and a PEFT adapter in fp32 (the default), with its loss and order, and bf16 autocast."""
    settings = run_of(shape, rank, size).model
    alike = {"lora_alpha": 2 * rank, "use_rslora": True, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    with quiet_peft():
        model = get_peft_model(base, LoraConfig(r=rank, **alike))

    def padded(batch: list[Encoded]) -> dict[str, Tensor]:
        ids = torch.tensor([example.input_ids for example in batch])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            args = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=GLOBAL // size,
                max_steps=len(examples) // GLOBAL,
                learning_rate=settings.learning_rate,
                lr_scheduler_type=settings.scheduler if settings.scheduler != "constant" else "constant_with_warmup",
                warmup_steps=settings.warmup,
                max_grad_norm=settings.max_grad_norm,
                logging_steps=1,
                bf16=True,
                seed=0,
                use_cpu=base.device.type == "cpu",
                dataloader_pin_memory=base.device.type == "cuda",
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            stamper = Stamper()
            begun()
            trainer = Trainer(model, args, padded, list(examples), callbacks=[stamper])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            return measured(stamper, shape)
    finally:
        model.unload()
        base.requires_grad_(False)


@contextlib.contextmanager
def quiet() -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def begun() -> None:
    freed()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def measured(stamps: Stamps | Stamper, shape: Shape) -> Row:
    """Return the time, the tokens per second and the peak memory of the median step after the warm-up."""
    turns = [after - before for before, after in zip(stamps.times[WARM - 1 :], stamps.times[WARM:], strict=False)]
    found = {"seconds": median(turns), "slowest": max(turns), "fastest": min(turns), "turns": turns}
    found |= {"tokens_per_second": GLOBAL * shape.length / median(turns), "losses": stamps.losses}
    found["loss"] = stamps.losses[0]
    peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None
    return found | {"peak_gib": peak}


def ratios(table: Table) -> dict[str, float]:
    found = {}
    for size in (1, 2, 4):
        for key, title in (("tokens_per_second", "tokens/s"), ("peak_gib", "peak memory")):
            mine = table.value(f"ours, {size} at a time", key)
            other = table.value(f"Trainer + PEFT, {size} at a time", key)
            if mine and other:
                found[f"{title}, ours / Trainer + PEFT, {size} at a time"] = mine / other
    return found
