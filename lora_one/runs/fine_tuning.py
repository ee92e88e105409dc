"""The training stage of a run: training, the final evaluation, and the adapters of each epoch."""

from functools import partial
from typing import Any

from torch import nn

from lora_one.adaptation.checkpoints import load_factors
from lora_one.distributed import Processes
from lora_one.files import read_lines
from lora_one.models.peak_memory import peak_memory
from lora_one.records.tracking import Tracker
from lora_one.runs.parts import RunParts
from lora_one.training.job import TrainingJob
from lora_one.training.loop import train
from lora_one.training.loss_curve import first_and_last


def fine_tune(parts: RunParts, model: nn.Module, tracker: Tracker) -> None:
    """Train, unless model.epochs=0, evaluate the result, and record both in run.json."""
    folder = parts.folder
    record = folder.read()
    tracker.summarize({name: record.get(name) for name in ("trainable_parameters", "init")})
    done = {"steps": 0, "seconds": 0.0, "tokens": 0}
    if parts.run.model.epochs > 0:
        done = train(model, parts.splits.train, training_job(parts, model, tracker))
    lines = read_lines(folder.metrics)
    final = logged_evaluation(lines, done["steps"])
    if final is None:
        final = parts.validation(model)
        tracker.log(done["steps"], final)
    peak = max(Processes.current().gathered(peak_memory()))
    if Processes.current().rank > 0:
        return
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = folder.read()["evaluation"]
    folder.update(
        train=done | first_and_last(losses) | {"processes": Processes.current().count},
        evaluation=evaluations | {"final": final},
        peak_memory_bytes=peak,
    )


def training_job(parts: RunParts, model: nn.Module, tracker: Tracker) -> TrainingJob:
    """Return what training needs besides the model and its examples."""
    return TrainingJob(
        parts.run,
        parts.adaptation,
        tracker,
        parts.folder.checkpoints,
        parts.encoder.pad_id,
        evaluate=parts.validation if parts.validation else None,
        keep_epoch=partial(save_epoch, parts, model) if parts.run.model.keep_epochs else None,
        gradients=load_factors(parts.folder.gradient_vectors),
    )


def logged_evaluation(lines: list[dict[str, Any]], step: int) -> dict[str, Any] | None:
    """Return the last evaluation if training logged it at this step, on every process; else None.

    lines: those of metrics.jsonl, which only the first process is sure to see complete.
    """
    last = next((line for line in reversed(lines) if "eval_loss" in line), {})
    last = Processes.current().gathered(last)[0]
    if last.get("step") != step:
        return None
    return {name: value for name, value in last.items() if name.startswith("eval_")}


def save_epoch(parts: RunParts, model: nn.Module, epoch: int) -> None:
    """Write epochs/<n>, the result if training ended after this epoch; only the first process writes."""
    if Processes.current().rank == 0:
        parts.adaptation.save(model, parts.folder.epochs / str(epoch), final=False)
