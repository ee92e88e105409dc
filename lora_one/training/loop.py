"""Train a model with the Hugging Face Trainer."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from lora_one.data.encode import Encoded
from lora_one.data.encoded_cache import lengths_of
from lora_one.data.order import MicroBatches
from lora_one.datasets import DATASETS
from lora_one.distributed import Processes
from lora_one.interruption import Interrupted, deferred
from lora_one.optim import build_optimizer
from lora_one.progress import progress
from lora_one.seeding import seed_everything, seed_for
from lora_one.training.arguments import arguments
from lora_one.training.batches import Collator
from lora_one.training.callbacks import (
    AfterEpoch,
    AfterStep,
    DiagnosticsLogger,
    EarlyStopping,
    Recorder,
    StopOnSignal,
    TrainingProgress,
    exhausted,
)
from lora_one.training.job import TrainingJob
from lora_one.training.packing import check_packing, one_example_per_row
from lora_one.training.resume_points import keep_only, last_checkpoint, state_of, step_of
from lora_one.training.schedule import micro_batch, steps_per_epoch
from lora_one.training.trainer import FineTuner, ignore_frozen


def train(model: nn.Module, examples: Sequence[Encoded], job: TrainingJob) -> dict[str, Any]:
    """Fine-tune the trainable parameters in place, from the newest resume point if there is one.

    Returns {steps, seconds, tokens}: optimizer steps; seconds of training, also before a resumption; tokens of prompts
    and responses, without padding.
    Raises RunError: a loss is not finite, or a resume point cannot be written.  UsageError: the model does not support
    packing.  Interrupted: after the step in which a signal arrived, with a resume point.
    """
    packing = job.run.model.packing
    if packing:
        check_packing(model, examples)
    ignore_frozen(model)
    stopper = StopOnSignal()
    trainer = build_trainer(model, examples, job, stopper)
    if rank := Processes.current().rank:  # otherwise dropout would be the same on all processes
        seed_everything(seed_for(job.run.training_seed, f"dropout of process {rank}"))
    last = last_checkpoint(job.checkpoints)
    if last is not None:
        job.tracker.forget_after(step_of(last))
        if trainer.args.should_save:
            keep_only(Path(last))
    done = 0 if last is None else step_of(last)
    with (
        deferred(),
        nullcontext() if packing else one_example_per_row(),
        progress("training", trainer.args.max_steps, "steps", done) as shown,
    ):
        trainer.add_callback(TrainingProgress(shown, DATASETS[job.run.dataset.name].accuracy_name))
        if done:
            shown.note(f"continuing after step {done} of {trainer.args.max_steps}")
        if last is not None and ended(last, trainer.args.max_steps, job.run.model.early_stopping_patience):
            trainer.restore(last)
        else:
            trainer.train(resume_from_checkpoint=last)
    if stopper.signal:  # of this process or of another one
        raise Interrupted(stopper.signal)
    return {
        "steps": trainer.state.global_step,
        "seconds": trainer.seconds,
        "tokens": int(trainer.state.num_input_tokens_seen),
    }


def ended(point: str, max_steps: int, patience: int) -> bool:
    """Return whether training had ended at a resume point; the Trainer would take the rest of its epoch."""
    return step_of(point) >= max_steps or (patience > 0 and exhausted(state_of(point).log_history, patience))


def build_trainer(model: nn.Module, examples: Sequence[Encoded], job: TrainingJob, stopper: StopOnSignal) -> FineTuner:
    """Return the Trainer of a job, with its optimizer and callbacks."""
    settings = job.run.model
    trainer = FineTuner(
        job,
        MicroBatches(
            lengths=lengths_of(examples),
            global_size=settings.real_batch_size,
            size=micro_batch(settings, Processes.current().count),
            processes=Processes.current(),
            seed=job.run.order_seed,
        ),
        model=model,
        args=arguments(job, len(examples)),
        train_dataset=examples,
        eval_dataset=examples[:1],  # required by the Trainer; FineTuner.evaluate does not use it
        data_collator=Collator(examples[0], job.pad_id, settings.packing, settings.loss),
        optimizers=(build_optimizer(model, job.run), None),
        callbacks=[
            Recorder(job.tracker),
            stopper,
            AfterStep(job.adaptation),
            *optional_callbacks(model, examples, job),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def optional_callbacks(model: nn.Module, examples: Sequence[Encoded], job: TrainingJob) -> list[TrainerCallback]:
    """Return the callbacks that only some settings need."""
    run, callbacks = job.run, []
    if job.keep_epoch is not None:
        callbacks.append(AfterEpoch(steps_per_epoch(len(examples), run.model), job.keep_epoch))
    if run.wandb.diagnostics_every:
        callbacks.append(DiagnosticsLogger(model, run.wandb.diagnostics_every, job.gradients, job.tracker))
    if run.model.early_stopping_patience:
        callbacks.append(EarlyStopping(run.model.early_stopping_patience))
    return callbacks
