"""The fine-tuning loop, on the Hugging Face Trainer: ours are the loss, the evaluation and the record."""

import heapq
import json
import math
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, masking_utils
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from lora_one.adaptation.layers import FactorPairs, inputs_not_cast, plain_layers
from lora_one.adaptation.protocol import Adaptation
from lora_one.config import RunConfig
from lora_one.config.schemas import ModelConfig
from lora_one.data.encode import Encoded, collate, pack
from lora_one.data.order import MicroBatches
from lora_one.distributed import Processes
from lora_one.errors import RunError, UsageError
from lora_one.files import publish
from lora_one.interruption import Interrupted, deferred
from lora_one.losses import IGNORED, counted_of, evaluating, few_logits, loss_at, model_logits, targets
from lora_one.model_kinds import CAUSAL
from lora_one.optim import build_optimizer
from lora_one.records.tracking import Tracker
from lora_one.seeding import seed_everything, seed_for
from lora_one.training.callbacks import AfterStep, Bar, EpochEnds, Lines, Recorder, Stopper, Watcher

RESUME_EVERY = 500  # optimizer steps between two resume points at the most, unless model.save_steps says otherwise
LOSS_WINDOW = 10  # logged losses that the first and the last loss of a run are averaged over, at most
# the Trainer's name for it; older versions of transformers have only the latter
NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(name for name in NAMES if name in TrainingArguments.__dataclass_fields__)
HIDDEN = ".partial"  # beside the resume points: one that is being written or removed
COUNTED, TOKENS = "counted", "tokens"  # beside a batch's tensors: where it counts, and how many tokens it has
Evaluate = Callable[[nn.Module], dict[str, float]]


def last_checkpoint(checkpoints: Path) -> str | None:
    """The newest resume point in a folder, if there is one."""
    return get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None


def keep_only(newest: Path) -> None:
    """Remove the older resume points, each hidden first: removed in part, it must not look like one."""
    hidden = newest.parent / HIDDEN
    for older in newest.parent.glob("checkpoint-*"):
        if older != newest:
            hidden.mkdir(exist_ok=True)
            older.rename(hidden / older.name)
    shutil.rmtree(hidden, ignore_errors=True)


def check_resume_point(checkpoints: Path) -> None:
    """Raises RunError when the newest resume point, if there is one, is not whole."""
    last = last_checkpoint(checkpoints)
    if last is None:
        return
    path = Path(last)
    try:
        json.loads((path / "trainer_state.json").read_text())["global_step"]
        whole = path / "model.safetensors"  # of full fine-tuning
        with safe_open(whole if whole.exists() else path / "adapter_model.safetensors", "pt") as tensors:
            tensors.keys()
        states = list(path.glob("rng_state*.pth")) or [path / "rng_state.pth"]
        for file in (path / "optimizer.pt", path / "scheduler.pt", *states):
            if not zipfile.is_zipfile(file):
                raise ValueError(f"{file.name} is {'cut short' if file.exists() else 'missing'}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"the resume point {path} is broken ({type(error).__name__}: {error}): remove that folder, or add "
            "overwrite=true, and the run starts anew"
        ) from error


def accumulation_steps(model: ModelConfig, processes: int) -> int:
    """Micro-batches per optimizer step, so that ``real_batch_size`` counts examples over all processes.

    Raises UsageError when it does not divide.
    """
    together = model.per_device_batch_size * processes
    if model.real_batch_size % together:
        raise UsageError(
            f"model.real_batch_size={model.real_batch_size} is not divisible by model.per_device_batch_size="
            f"{model.per_device_batch_size} x {processes} processes; take a multiple of {together}"
        )
    return model.real_batch_size // together


def steps_per_epoch(examples: int, model: ModelConfig) -> int:
    """Optimizer steps in one pass; the last of them may be over a smaller batch."""
    return math.ceil(examples / model.real_batch_size)


def total_steps(examples: int, model: ModelConfig) -> int:
    return math.ceil(model.epochs * steps_per_epoch(examples, model))


def warmup_steps(examples: int, model: ModelConfig) -> int:
    """Optimizer steps of the warm-up, as the Trainer counts them."""
    return int(model.warmup) if model.warmup >= 1 else math.ceil(model.warmup * total_steps(examples, model))


def refuse_no_learning(examples: int, model: ModelConfig) -> None:
    """Raises UsageError: the only optimizer step is the first one of a warm-up, whose learning rate is 0."""
    if total_steps(examples, model) == 1 and warmup_steps(examples, model) >= 1:
        raise UsageError(
            f"model.warmup={model.warmup:g} starts with learning rate 0, and the run has only one step, so nothing "
            "would be trained: set model.warmup=0, or train for more steps (model.epochs, model.real_batch_size)"
        )


def first_and_last(losses: Sequence[float]) -> dict[str, float | None]:
    """{first_loss, last_loss}: the means of the first and of the last logged losses of a run.

    Each is over LOSS_WINDOW losses, or over half of them where there are fewer than two windows, so that no loss is
    in both. None without losses; a single loss is both.
    """
    window = min(LOSS_WINDOW, max(1, len(losses) // 2))
    return {
        "first_loss": mean(losses[:window]) if losses else None,
        "last_loss": mean(losses[-window:]) if losses else None,
    }


def first_step_size(examples: int, model: ModelConfig) -> float:
    """Learning rate of the first warm-up step: learning_rate / warm-up steps (LoRA-SB's eta, arXiv:2411.19557).

    Steps are the optimizer's; the published code counts micro-batches here, which makes it many times too small.
    """
    return model.learning_rate / max(1, warmup_steps(examples, model))


class Arguments(TrainingArguments):
    """The Trainer's settings, for at most one GPU per process.

    Where one process sees several GPUs, the Trainer would train under DataParallel, to which accelerate does not
    apply autocast.
    """

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


def arguments(run: RunConfig, examples: int, checkpoints: Path, processes: int, *, evaluated: bool) -> Arguments:
    """The Trainer's settings; everything that is not set here is its default."""
    model = run.model
    an_epoch = steps_per_epoch(examples, model)
    return Arguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=model.per_device_batch_size,
        gradient_accumulation_steps=accumulation_steps(model, processes),
        max_steps=total_steps(examples, model),
        learning_rate=model.learning_rate,
        lr_scheduler_type=model.scheduler if model.scheduler != "constant" else "constant_with_warmup",
        warmup_steps=model.warmup,
        max_grad_norm=model.max_grad_norm,
        bf16=model.bf16,
        **{CHECKPOINTING: model.gradient_checkpointing},
        ddp_broadcast_buffers=False,  # equal on every process and constant, LoRA-SB's and LoRA-XS's factors among them
        logging_steps=model.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluated else "no",
        eval_steps=max(1, round(model.eval_epochs * an_epoch)),
        save_strategy="steps",
        save_steps=model.save_steps or min(an_epoch, RESUME_EVERY),
        restore_callback_states_from_checkpoint=True,  # early stopping's patience
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        seed=run.training_seed,
        data_seed=run.order_seed,
        use_cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
    )


@torch.no_grad()
def check_packing(model: nn.Module, examples: Sequence[Encoded]) -> None:
    """Two examples in one row must give the logits of each alone.

    Raises UsageError: this model's attention crosses their boundary, or its positions do not begin anew.
    """
    pair = heapq.nsmallest(2, examples, key=lambda example: len(example.input_ids))
    with evaluating(model):
        alone = torch.cat([model_logits(model, pack([example]))[0] for example in pair]).float()
        together = model_logits(model, pack(pair))[0].float()
    change = float((together - alone).abs().max() / alone.abs().max())
    rounding = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
    if not change <= rounding:
        raise UsageError(
            f"model.packing=true: two examples in one row change each other's logits in this model, by {change:.2g} of "
            "the largest, so its attention does not keep them apart: drop model.packing"
        )


class FineTuner(Trainer):
    """The Trainer with our order, our loss (by token or by example over the global batch) and our evaluation."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the global batch's own count

    def __init__(
        self,
        run: RunConfig,
        adaptation: Adaptation,
        order: MicroBatches,
        evaluate: Evaluate | None,
        **options: Any,
    ):
        config = getattr(options["model"], "config", None)
        cached = getattr(config, "use_cache", None)
        super().__init__(**options)
        if cached is not None:  # the Trainer turns it off, and so it would be saved with the merged model
            config.use_cache = cached
        elif hasattr(config, "use_cache"):  # new: a model without such a switch
            del config.use_cache
        self.adaptation = adaptation
        self.order = order
        self.reduction = run.model.loss
        self.causal = run.model.kind is CAUSAL
        self.evaluate_model = evaluate
        self.without_casts = plain_layers(self.model) if run.model.bf16 else []

    def get_train_dataloader(self) -> DataLoader:
        """This process's micro-batches; the order knows its share, so accelerate shares nothing out."""
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

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        with inputs_not_cast(self.without_casts):  # also while the backward pass repeats checkpointed blocks
            return super().training_step(*arguments, **options)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This micro-batch's part of the global batch's mean; times the processes, whose gradients are averaged."""
        counted = inputs[COUNTED]
        left_out = {"labels", COUNTED, TOKENS} | ({"attention_mask"} if self.causal else set())  # padding comes last
        given = {name: value for name, value in inputs.items() if name not in left_out}
        logits = model(**given, **few_logits(self.model, inputs, counted), use_cache=False).logits
        total = loss_at(logits, counted)
        loss = total * self.accelerator.num_processes / num_items_in_batch
        extra = self.adaptation.extra_loss(self.model)
        if extra is not None:  # once a step: each micro-batch brings its share
            loss = loss + extra / self.current_gradient_accumulation_steps
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> int:
        """What the global batch's loss is divided by; its tokens are added to those seen.

        Both were counted on the CPU; only several processes, which add theirs up, wait for the device here.
        """
        count = sum(batch[COUNTED].count for batch in batch_samples)
        tokens = sum(batch[TOKENS] for batch in batch_samples)
        if self.accelerator.num_processes > 1:
            both = torch.tensor([[count, tokens]], device=device)
            count, tokens = self.accelerator.gather(both).sum(dim=0).tolist()
        self.state.num_input_tokens_seen += tokens
        return count

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Counted above, once a step: the Trainer's own count waits for all processes at every micro-batch."""

    def _get_output_dir(self, trial: Any) -> str:
        """Where the Trainer writes a resume point: out of sight until it is whole."""
        return str(Path(self.args.output_dir) / HIDDEN)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The best value serves early stopping; no resume point is kept, or named, for having it."""
        best = super()._determine_best_metric(metrics, trial)
        self.state.best_global_step = None
        return best

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A resume point appears whole or not at all, and then the older one goes.

        Raises RunError when it cannot be written (no space left, say); the older one is then untouched.
        """
        hidden, point = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        place = Path(self.args.output_dir) / point
        try:
            with self.adaptation.saving_state(self.model):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.adaptation.save_state(self.model, hidden / point)
                publish(hidden / point, place)
                keep_only(place)
        except (OSError, RuntimeError, SafetensorError) as error:  # the latter two: of a full disk, from the libraries
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
            raise RunError(
                f"the resume point {place} cannot be written ({reason}): free space, and the same command goes on from "
                "the last one"
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(hidden, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.adaptation.load_state(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        metrics = self.evaluate_model(self.model)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def leave_shards_alone(model: nn.Module) -> None:
    """A sharded base is frozen: DDP averages the adapters' gradients and passes over the rest."""
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if any(isinstance(parameter, DTensor) for parameter in frozen.values()):
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(frozen))


@contextmanager
def one_example_per_row() -> Iterator[None]:
    """transformers does not look for several examples in a row, which makes the host wait in every forward pass."""
    search = getattr(masking_utils, "find_packed_sequence_indices", None)
    if search is None:  # another version of transformers
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None  # its answer where there is one example
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


def train(
    model: nn.Module,
    examples: Sequence[Encoded],
    run: RunConfig,
    adaptation: Adaptation,
    *,
    evaluate: Evaluate | None,
    checkpoints: Path,
    pad_id: int,
    tracker: Tracker,
    processes: int = 1,
    keep: Callable[[int], None] | None = None,
    gradients: FactorPairs | None = None,
) -> dict[str, Any]:
    """Fine-tune the trainable parameters in place; goes on from the last checkpoint if there is one.

    keep: is told the number of every epoch that is through.  gradients: for ``Watcher``.
    Returns {steps, seconds, tokens}: optimizer steps; seconds since the start or the resumption; tokens seen,
    prompt and response, without padding. Raises RunError: a loss that is not finite; Interrupted: after the step in
    which a signal came, with a resume point.
    """
    if run.model.packing:
        check_packing(model, examples)
    everyone = Processes.current()
    order = MicroBatches(
        lengths=[example.tokens for example in examples],
        global_size=run.model.real_batch_size,
        size=run.model.per_device_batch_size,
        processes=everyone,
        seed=run.order_seed,
    )

    def collated(batch: list[Encoded]) -> dict[str, Any]:
        """Where this process has no example left: another's, which counts for nothing."""
        whole = batch or [examples[0]]
        found = pack(whole) if run.model.packing else collate(whole, pad_id)
        if not batch:
            found["labels"] = torch.full_like(found["labels"], IGNORED)
        counted = counted_of(targets(found), run.model.loss, found.get("position_ids"))
        return found | {COUNTED: counted, TOKENS: sum(example.tokens for example in batch)}

    args = arguments(run, len(examples), checkpoints, processes, evaluated=evaluate is not None)
    leave_shards_alone(model)
    stopper = Stopper()
    callbacks: list[TrainerCallback] = [Recorder(tracker), stopper, AfterStep(adaptation)]
    if keep is not None:
        callbacks.append(EpochEnds(steps_per_epoch(len(examples), run.model), keep))
    if run.wandb.diagnostics_every:
        callbacks.append(Watcher(model, run.wandb.diagnostics_every, gradients or {}, tracker))
    if run.model.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(run.model.early_stopping_patience))
    trainer = FineTuner(
        run,
        adaptation,
        order,
        evaluate,
        model=model,
        args=args,
        train_dataset=examples,
        eval_dataset=examples[:1],  # the Trainer wants one; FineTuner.evaluate has its own
        data_collator=collated,
        optimizers=(build_optimizer(model, run), None),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Lines() if args.disable_tqdm else Bar())
    if everyone.rank:  # else all processes would drop the same entries
        seed_everything(seed_for(run.training_seed, f"dropout of process {everyone.rank}"))
    last = last_checkpoint(checkpoints)
    if last is not None:
        tracker.forget_after(int(last.rpartition("-")[2]))
        if args.should_save:
            keep_only(Path(last))
    with deferred(), nullcontext() if run.model.packing else one_example_per_row():
        output = trainer.train(resume_from_checkpoint=last)
    if stopper.signal:  # perhaps another process's
        raise Interrupted(stopper.signal)
    return {
        "steps": trainer.state.global_step,
        "seconds": output.metrics["train_runtime"],
        "tokens": int(trainer.state.num_input_tokens_seen),
    }
