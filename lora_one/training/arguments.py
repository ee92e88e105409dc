"""Translate the settings of a run to those of the Hugging Face Trainer."""

import torch
from transformers import TrainingArguments

from lora_one.distributed import Processes
from lora_one.training.job import TrainingJob
from lora_one.training.resume_points import HIDDEN
from lora_one.training.schedule import accumulation_steps, micro_batch, steps_per_epoch, total_steps

RESUME_EVERY = 500  # maximum of optimizer steps between two resume points, unless model.save_steps is set
# the Trainer's argument; older versions of transformers have only the second name
NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(name for name in NAMES if name in TrainingArguments.__dataclass_fields__)


class Arguments(TrainingArguments):
    """The Trainer's settings, for at most one GPU per process.

    With several GPUs in one process the Trainer would use DataParallel, to which accelerate does not apply autocast.
    """

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


def arguments(job: TrainingJob, examples: int) -> Arguments:
    """Return the Trainer's settings for training on this number of examples; all others keep their defaults.

    The Trainer writes a resume point to a hidden folder; ``FineTuner`` moves it when it is complete.
    """
    run, model = job.run, job.run.model
    epoch_steps = steps_per_epoch(examples, model)
    return Arguments(
        output_dir=str(job.checkpoints / HIDDEN),
        per_device_train_batch_size=micro_batch(model, Processes.current().count),
        gradient_accumulation_steps=accumulation_steps(model, Processes.current().count),
        max_steps=total_steps(examples, model),
        learning_rate=model.learning_rate,
        lr_scheduler_type=model.scheduler if model.scheduler != "constant" else "constant_with_warmup",
        warmup_steps=model.warmup,
        max_grad_norm=model.max_grad_norm,
        bf16=model.bf16,
        **{CHECKPOINTING: model.gradient_checkpointing},
        ddp_broadcast_buffers=False,  # buffers (frozen factors, for example) are constant and equal on every process
        logging_steps=model.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="no" if job.evaluate is None else "steps",
        eval_steps=max(1, round(model.eval_epochs * epoch_steps)),
        save_strategy="steps",
        save_steps=model.save_steps or min(epoch_steps, RESUME_EVERY),
        seed=run.training_seed,
        data_seed=run.order_seed,
        use_cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,  # loop.py shows the progress
    )
