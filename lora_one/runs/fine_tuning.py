"""The training stage of a run: training, the final evaluation, and the adapters of each epoch."""

from functools import partial

from torch import nn

from lora_one.adaptation.checkpoints import load_factors
from lora_one.distributed import Processes
from lora_one.records.tracking import Tracker, read_metrics
from lora_one.runs.parts import RunParts
from lora_one.training.job import TrainingJob
from lora_one.training.loop import train
from lora_one.training.loss_curve import first_and_last


def fine_tune(parts: RunParts, model: nn.Module, tracker: Tracker) -> None:
    """Train, unless model.epochs=0, evaluate the result, and record both in run.json."""
    run, folder, validation = parts.run, parts.folder, parts.validation
    processes = Processes.current()
    begun = folder.read()
    tracker.summarize({name: begun.get(name) for name in ("trainable_parameters", "init")})
    done = {"steps": 0, "seconds": 0.0, "tokens": 0}
    if run.model.epochs > 0:
        job = TrainingJob(
            run,
            parts.adaptation,
            tracker,
            folder.checkpoints,
            parts.encoder.pad_id,
            evaluate=validation if validation else None,
            keep_epoch=partial(keep_epoch, parts, model) if run.model.keep_epochs else None,
            gradients=load_factors(folder.gradient_vectors),
        )
        done = train(model, parts.splits.train, job)
    lines = read_metrics(folder.metrics)
    last = processes.gathered(next((line for line in reversed(lines) if "eval_loss" in line), {}))[0]
    if last.get("step") == done["steps"]:
        final = {name: value for name, value in last.items() if name.startswith("eval_")}
    else:
        final = validation(model)
        tracker.log(done["steps"], final)
    if processes.rank > 0:
        return
    losses = [line["loss"] for line in lines if "loss" in line]
    folder.update(
        train=done | first_and_last(losses),
        evaluation=folder.read()["evaluation"] | {"final": final},
    )


def keep_epoch(parts: RunParts, model: nn.Module, epoch: int) -> None:
    """Write epochs/<n>, the result if training ended after this epoch; only the first process writes."""
    if Processes.current().rank == 0:
        parts.adaptation.save(model, parts.folder.epochs / str(epoch), final=False)
