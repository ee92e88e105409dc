"""Examples and tokens per second in fine-tuning, compared with the published setting and with plain Trainer + PEFT.

    python benchmarks/bench_train.py --model stories260K-hf --data_path gsm8k --threads 1 --json train.json --markdown

LoRA from the same factors on the same global batches of 32 examples: one example at a time, as published, and --size
at a time, each with lora_one and with the Trainer of transformers with a PEFT adapter, its own loss and random
micro-batches. The cases alternate; times and ratios are medians over the repeats. The script stops if a step's loss
has a relative difference of more than 1e-5 from that of the first case. --shape uses random weights of that shape.
"""

import argparse
import contextlib
import copy
import io
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import SHAPES, Clock, set_threads, write_result
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lora_one.adaptation.selection import adaptation_of
from lora_one.config import RunConfig
from lora_one.data import load_dataset
from lora_one.data.encode import Encoded
from lora_one.data.encoders import encoder_for
from lora_one.data.order import order_of
from lora_one.files import read_lines
from lora_one.initialization.methods import build_init
from lora_one.initialization.start import attach_adapters
from lora_one.models import load_model
from lora_one.records.tracking import Tracker
from lora_one.runs.composition import compose
from lora_one.training.job import TrainingJob
from lora_one.training.loop import train
from lora_one.training.schedule import total_steps

NO_FILE = Path("no run")  # initial factors that do not exist
AGREE = 1e-5  # largest relative difference of a step's loss
FIGURES = {
    "seconds": ("seconds", "{:.2f}"),
    "examples_per_second": ("examples per second", "{:.2f}"),
    "slowest": ("slowest", "{:.2f}"),
    "fastest": ("fastest", "{:.2f}"),
    "tokens_per_second": ("tokens per second", "{:.0f}"),
    "examples_per_cpu_second": ("examples per CPU second", "{:.2f}"),
    "loss_difference": ("loss, largest difference", "{:.1e}"),
}


@dataclass(frozen=True)
class Subject:
    """The model, the examples and the settings that all cases share."""

    base: nn.Module
    examples: list[Encoded]
    run: RunConfig
    pad_id: int

    def adapted(self) -> nn.Module:
        """Return a copy of the base with LoRA at its default start, the same each time."""
        base, run = copy.deepcopy(self.base), self.run
        return attach_adapters(base, adaptation_of(run, NO_FILE), build_init(run.init), None, seed=0)[0]


class Order(Sampler[int]):
    """Our order of the examples, epoch by epoch."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        yield from order_of(self.count, self.seed, self.epoch).tolist()
        self.epoch += 1


class InOurOrder(Trainer):
    """The plain Trainer on our global batches."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return Order(len(self.train_dataset), self.args.seed)


@dataclass(frozen=True)
class Done:
    """Result of one training."""

    losses: list[float]  # by step
    clock: Clock


def ours(at: Subject, **changes: Any) -> Done:
    """Train with lora_one. changes: settings of the section ``model``."""
    model, run = at.adapted(), replace(at.run, model=replace(at.run.model, **changes))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        tracker, points = Tracker(Path(folder) / "metrics.jsonl"), Path(folder) / "checkpoints"
        clock = Clock()
        train(
            model,
            at.examples,
            TrainingJob(run, adaptation_of(run, NO_FILE), checkpoints=points, pad_id=at.pad_id, tracker=tracker),
        )
        clock.stop()
        return Done([line["loss"] for line in read_lines(tracker.path)], clock)


def plain(at: Subject, size: int) -> Done:
    """Train with the Trainer's loop, loss and micro-batches, a PEFT adapter and the same settings."""
    settings, started = at.run.model, at.adapted().state_dict()
    peft = at.run.peft
    config = LoraConfig(
        r=peft.lora_r, lora_alpha=peft.lora_alpha, use_rslora=peft.use_rslora, target_modules="all-linear"
    )
    model = get_peft_model(copy.deepcopy(at.base), config)
    model.load_state_dict(started)

    def padded(batch: list[Encoded]) -> dict[str, Tensor]:
        rows = [torch.tensor(example.input_ids) for example in batch]
        masks, labels = [torch.ones_like(row) for row in rows], [torch.tensor(example.labels) for example in batch]
        fillers = {"input_ids": (rows, at.pad_id), "attention_mask": (masks, 0), "labels": (labels, -100)}
        return {name: pad_sequence(part, True, filler) for name, (part, filler) in fillers.items()}

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=settings.real_batch_size // size,
            max_steps=total_steps(len(at.examples), settings),
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.scheduler,
            warmup_steps=settings.warmup,
            max_grad_norm=settings.max_grad_norm,
            logging_steps=1,
            bf16=settings.bf16,
            seed=at.run.seed,
            data_seed=at.run.seed,
            use_cpu=at.base.device.type == "cpu",
            dataloader_pin_memory=at.base.device.type == "cuda",
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
        )
        clock = Clock()
        trainer = InOurOrder(model, args, padded, list(at.examples))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        clock.stop()
    return Done([line["loss"] for line in trainer.state.log_history if "loss" in line], clock)


def measure(
    at: Subject, cases: dict[str, Callable[[], Done]], repeats: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return a row for each case, and the ratios of their speeds.

    Raises AssertionError: a step's loss differs from that of the first case.
    """
    tokens = sum(len(example.input_ids) for example in at.examples)
    clocks: dict[str, list[Clock]] = {name: [] for name in cases}
    differences: dict[str, float] = {}
    reference: list[float] = []
    for turn in range(repeats):
        for name, work in cases.items():
            done = work()
            reference = reference or done.losses
            pairs = zip(done.losses, reference, strict=True)
            differences[name] = max(differences.get(name, 0.0), *(abs(a - b) / b for a, b in pairs))
            assert differences[name] <= AGREE, f"{name}: losses {done.losses} differ from {reference}"
            clocks[name].append(done.clock)
            clock = f"{done.clock.seconds:.2f} s, {done.clock.cpu_seconds:.2f} CPU seconds"
            print(f"{turn + 1}/{repeats} {name}: {clock}", flush=True)
    rows = []
    for name, taken in clocks.items():
        speeds = [len(at.examples) / clock.seconds for clock in taken]
        rows.append(
            {
                "name": name,
                "seconds": median(clock.seconds for clock in taken),
                "cpu_seconds": median(clock.cpu_seconds for clock in taken),
                "examples_per_second": median(speeds),
                "slowest": min(speeds),
                "fastest": max(speeds),
                "tokens_per_second": tokens / median(clock.seconds for clock in taken),
                "examples_per_cpu_second": len(at.examples) / median(clock.cpu_seconds for clock in taken),
                "loss_difference": differences[name],
            }
        )
    return rows, ratios(clocks)


def ratios(clocks: dict[str, list[Clock]]) -> dict[str, float]:
    """Return the speed of each of our cases divided by that of each Trainer case, the median over repeats."""
    found = {}
    for mine in (name for name in clocks if name.startswith("ours")):
        for other in (name for name in clocks if name.startswith("Trainer")):
            pairs = zip(clocks[mine], clocks[other], strict=True)
            found[f"{mine} / {other}"] = median(theirs.seconds / own.seconds for own, theirs in pairs)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled/tiny", help="folder of the model (%(default)s)")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, with the model's tokenizer")
    parser.add_argument("--data_path", help="folder of GSM8K (default: generated problems)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of 32 examples (%(default)s)")
    parser.add_argument("--size", type=int, default=4, help="examples per micro-batch (%(default)s)")
    parser.add_argument("--max_length", type=int, default=384, help="maximum length in tokens (%(default)s)")
    parser.add_argument("--skip", nargs="*", default=[], metavar="WORD", help="leave out cases with WORD in their name")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch threads (default: chosen by torch)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="print the table and the ratios as Markdown at the end")
    chosen = parser.parse_args(arguments)
    set_threads(chosen)
    at = subject(chosen)
    size = chosen.size
    cases = {
        "Trainer + PEFT, 1 at a time": lambda: plain(at, 1),
        f"Trainer + PEFT, {size} at a time": lambda: plain(at, size),
        "ours, 1 at a time": lambda: ours(at, per_device_batch_size=1),
        f"ours, {size} at a time": lambda: ours(at, per_device_batch_size=size),
        f"ours, {size} packed": lambda: ours(at, per_device_batch_size=size, packing=True),
        f"ours, {size}, checkpointing": lambda: ours(at, per_device_batch_size=size, gradient_checkpointing=True),
    }
    cases = {name: case for name, case in cases.items() if not any(word in name for word in chosen.skip)}
    load = os.getloadavg()[0]
    rows, found = measure(at, cases, chosen.repeats)
    sizes = ("model", "shape", "data_path", "steps", "size", "max_length", "repeats")
    settings = {name: getattr(chosen, name) for name in sizes} | {"examples": len(at.examples), "load_before": load}
    write_result(chosen, {"settings": settings, "rows": rows, "ratios": found}, FIGURES)


def subject(chosen: argparse.Namespace) -> Subject:
    """Load the model onto the device, and as many examples as the steps need."""
    data = ["dataset=gsm8k", f"dataset.path={chosen.data_path}"] if chosen.data_path else ["dataset=arithmetic"]
    keys = [f"model.name={chosen.model}", f"model.max_length={chosen.max_length}", "model.bf16=false"]
    run = compose([*data, "model=llama", *keys, "init=default", "wandb.mode=disabled"])
    encoder = encoder_for(run.model, run.dataset)
    wanted = chosen.steps * run.model.real_batch_size
    examples = load_dataset(run.dataset, encoder, run.model.max_length).train[:wanted]
    assert math.ceil(len(examples) / run.model.real_batch_size) == chosen.steps, f"only {len(examples)} examples"
    if chosen.shape is None:
        return Subject(load_model(run.model.name, where=chosen.device), examples, run, encoder.pad_id)
    shape = SHAPES[chosen.shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(encoder.tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=chosen.max_length,
    )
    base = LlamaForCausalLM(config).to(chosen.device).requires_grad_(False).eval()
    return Subject(base, examples, run, encoder.pad_id)


if __name__ == "__main__":
    main()
