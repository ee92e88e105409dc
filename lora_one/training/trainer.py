"""The Hugging Face Trainer with our order of examples, loss and evaluation, and with atomic resume points."""

import json
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import model_has_dtensor
from safetensors import SafetensorError
from torch import nn
from torch.nn import parallel
from torch.utils.data import DataLoader
from transformers import Trainer

from lora_one.adaptation.layers import inputs_not_cast, plain_layers
from lora_one.data.order import MicroBatches
from lora_one.errors import RunError
from lora_one.files import publish
from lora_one.interruption import note_progress
from lora_one.losses import few_logits, loss_at
from lora_one.model_kinds import CAUSAL
from lora_one.peers import of_connection
from lora_one.quiet import quiet_weights
from lora_one.training.batches import COUNTED, TOKENS
from lora_one.training.job import TrainingJob
from lora_one.training.resume_points import SECONDS, keep_only, seconds_of, state_of


class FineTuner(Trainer):
    """The Trainer with our order of examples, our loss (a mean over the global batch) and our evaluation.

    Two private methods are overridden, ``_save_checkpoint`` and ``_load_from_checkpoint``; docs/design.md (Decisions)
    gives the reasons.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the count of the global batch

    def __init__(self, job: TrainingJob, order: MicroBatches, **options: Any):
        config = getattr(options["model"], "config", None)
        cached = getattr(config, "use_cache", None)
        super().__init__(**options)
        if cached is not None:  # the Trainer sets it to False, which would be saved with the merged model
            config.use_cache = cached
        elif hasattr(config, "use_cache"):  # the Trainer added it to a model without this setting
            del config.use_cache
        self.order = order
        self.adaptation = job.adaptation
        self.evaluate_model = job.evaluate
        self.checkpoints = job.checkpoints
        self.causal = job.run.model.kind is CAUSAL
        self.without_casts = plain_layers(self.model) if job.run.model.bf16 else []
        if model_has_dtensor(self.model) and self.accelerator.num_processes > 1:
            self.model_wrapped = replicated(self.model, self.accelerator)  # the Trainer wraps no model twice

    def train(self, resume_from_checkpoint: str | None = None, **options: Any) -> Any:
        """Train from a resume point, and count the seconds before it in those of this training."""
        self.began = time.monotonic() - seconds_of(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)

    def restore(self, point: str) -> None:
        """Take over the trained values and the state of a resume point at which training had ended."""
        self.began = time.monotonic() - seconds_of(point)
        self._load_from_checkpoint(point)
        self.state = state_of(point)

    @property
    def seconds(self) -> float:
        """Return the seconds of training so far, without steps that were lost by an interruption."""
        return time.monotonic() - self.began

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's micro-batches; the order contains only these, so accelerate must not split them."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.order,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        device = self.accelerator.device
        return prepare_data_loader(
            loader, device, num_processes=1, process_index=0, put_on_device=True, non_blocking=loader.pin_memory
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """Return this process's micro-batches of one optimizer step, and the divisor of the global batch's loss."""
        batches = list(islice(epoch_iterator, num_batches))
        return batches, self.count_batches(batches, device)

    def count_batches(self, batches: list[dict[str, Any]], device: torch.device) -> int:
        """Return the divisor of the global batch's loss, and add the batch's tokens to those seen.

        Both were counted on the CPU; the host waits for the device only to sum over several processes.
        """
        count = sum(batch[COUNTED].count for batch in batches)
        tokens = sum(batch[TOKENS] for batch in batches)
        if self.accelerator.num_processes > 1:
            both = torch.tensor([[count, tokens]], device=device)
            count, tokens = self.accelerator.gather(both).sum(dim=0).tolist()
        self.state.num_input_tokens_seen += tokens
        return count

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """Do the passes of one micro-batch, without casts of adapter inputs that would not change them."""
        with inputs_not_cast(self.without_casts):  # also in the backward pass, which recomputes checkpointed blocks
            return super().training_step(*arguments, **options)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return this micro-batch's part of the global batch's mean loss, times the number of processes.

        The factor is needed because the gradients of the processes are averaged, not summed.
        """
        counted = inputs[COUNTED]
        # a causal model does not read the padding on the right, so it needs no mask
        left_out = {"labels", COUNTED, TOKENS} | ({"attention_mask"} if self.causal else set())
        given = {name: value for name, value in inputs.items() if name not in left_out}
        logits = model(**given, **few_logits(self.model, inputs, counted), use_cache=False).logits
        total = loss_at(logits, counted)
        loss = total * self.accelerator.num_processes / num_items_in_batch
        extra = self.adaptation.extra_loss(self.model)
        if extra is not None:  # once per step, divided among its micro-batches; only its gradient
            loss = loss + (extra - extra.detach()) / self.current_gradient_accumulation_steps
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Log and return the metrics of the job's evaluation."""
        metrics = self.evaluate_model(self.model)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a resume point atomically, then remove the older one.

        Raises RunError: it cannot be written (no space left, for example); the older one is then unchanged.
        """
        hidden, point = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        place = self.checkpoints / point
        try:
            with quiet_weights(), self.adaptation.saving_state(self.model):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.adaptation.save_state(self.model, hidden / point)
                (hidden / point / SECONDS).write_text(json.dumps(self.seconds))
                publish(hidden / point, place)
                note_progress()
                keep_only(place)
        except (OSError, RuntimeError, SafetensorError) as error:  # the last two: on a full disk
            if of_connection(error):  # another process is gone
                raise
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
            raise RunError(
                f"the resume point {place} cannot be written ({reason}): free disk space; the same command continues "
                "from the last resume point"
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(hidden, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Write the trained values of a resume point into the model, in place and in the model's dtype."""
        if not self.adaptation.load_state(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def replicated(model: nn.Module, accelerator: Accelerator) -> parallel.DistributedDataParallel:
    """Return a model with a sharded base in DDP, which averages the gradients of its adapters.

    accelerate refuses DDP for a model with DTensors on GPUs. Here these are frozen, and DDP ignores them, see
    `ignore_frozen`.
    """
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # adds autocast alone
    return parallel.DistributedDataParallel(model, **accelerator.ddp_handler.to_kwargs())


def ignore_frozen(model: nn.Module) -> None:
    """Make DDP ignore the frozen base, which it would send to every process before the first step.

    Every process has loaded the same base, or has its part of a sharded one.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
