"""The objects that the stages of a run share: its data, the initialisation examples, and what is trained."""

import os
from dataclasses import dataclass

from torch import nn

from lora_one import models
from lora_one.adaptation.protocol import Adaptation
from lora_one.adaptation.selection import adaptation_of
from lora_one.config import RunConfig
from lora_one.config.methods import MethodSettings
from lora_one.data import Splits, head_labels, load_dataset
from lora_one.data.encode import Encoder
from lora_one.data.encoders import encoder_for
from lora_one.distributed import Processes
from lora_one.errors import RunError, UsageError
from lora_one.evaluation.generate import context_length
from lora_one.evaluation.validation import Validation
from lora_one.initialization.low_rank_step import StepSettings
from lora_one.initialization.probe import probe_batches, refuse_too_few
from lora_one.initialization.solution import Probe
from lora_one.records.folder import RunFolder
from lora_one.seeding import seed_everything
from lora_one.training.resume_points import check_resume_point, last_checkpoint
from lora_one.training.schedule import first_step_size, refuse_idle, refuse_no_learning, total_steps


@dataclass(frozen=True)
class RunParts:
    """The settings, data, adaptation and output folder of a run, passed to each of its stages.

    probe: the examples that the initialisation method uses; None: it uses none.
    """

    run: RunConfig
    folder: RunFolder
    encoder: Encoder
    splits: Splits
    validation: Validation
    adaptation: Adaptation
    probe: Probe | None

    @property
    def init(self) -> MethodSettings:
        """Return the settings of the initialisation, with the values that depend on the number of examples."""
        examples = len(self.splits.train)
        return self.run.init.completed(lambda: first_step_size(examples, self.run.model), examples)

    @property
    def steps(self) -> int:
        """Return the optimizer steps of the whole training."""
        return total_steps(len(self.splits.train), self.run.model)

    @property
    def resuming(self) -> bool:
        """Return whether the run continues from a resume point."""
        return last_checkpoint(self.folder.checkpoints) is not None


def check_before_loading(run: RunConfig, folder: RunFolder) -> None:
    """Check the model's config.json and the run's folder before any data or weights are loaded.

    Raises RunError: the resume point is broken, or an automatic restart would delete it. UsageError: the model lacks
    the configured layers or positions.
    """
    if not run.overwrite:
        check_resume_point(folder.checkpoints)
    elif started_again() and last_checkpoint(folder.checkpoints) is not None:
        raise RunError(
            f"overwrite=true would delete {folder.path} in this automatic restart: repeat the command without it, and "
            "it continues from the last resume point"
        )
    skeleton = models.load_skeleton(run.model.name, run.model.revision, run.model.type)
    adaptation_of(run, folder.initial_factors).layers(skeleton, run.init)
    models.check_positions(skeleton, run.model)


def started_again() -> bool:
    """Return whether torchrun or SLURM has started this process again after a failure."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name, "0")) > 0 for name in names)


def load_parts(run: RunConfig, folder: RunFolder) -> RunParts:
    """Load the data of a run and draw the examples of its initialisation."""
    encoder = encoder_for(run.model, run.dataset)
    splits = load_dataset(run.dataset, encoder, run.model.max_length)
    validation = Validation(run, splits, encoder)
    refuse_too_few(run, len(splits.train_texts))
    probe = draw_probe(run, splits, encoder)
    adaptation = adaptation_of(run, folder.initial_factors, encoder.tokenizer)
    return RunParts(run, folder, encoder, splits, validation, adaptation, probe)


def draw_probe(run: RunConfig, splits: Splits, encoder: Encoder) -> Probe | None:
    """Return the examples that the method uses and, for a gradient, how it is computed; None: it uses no examples."""
    if not run.init.needs_examples:
        return None
    batches, others = probe_batches(run, splits.train_texts, encoder)
    if not run.init.needs_gradient:
        return Probe(batches, "example")
    settings = StepSettings.of(run.init, checkpointing=run.model.gradient_checkpointing)
    # with a transform, the singular vectors found are not those of the gradient itself
    vectors = run.wandb.diagnostics_every > 0 and run.init.transform is None
    return Probe(batches, run.init.reduction, settings, vectors, others)


def load_base(parts: RunParts) -> nn.Module:
    """Load the base model for this run; the weights of a new classification head are drawn with the run's seed."""
    run, model = parts.run, parts.run.model
    labels = head_labels(model.type, run.dataset.name)
    options = {
        "dtype": parts.adaptation.base_dtype(model),
        "quantization": model.quantization,
        "model_type": model.type,
        "labels": labels,
        "pad_id": parts.encoder.pad_id,
    }
    processes = Processes.current().count
    shards = model.shards(processes)
    seed_everything(run.training_seed)  # for the new head
    base = models.load_model(model.name, model.revision, shards=shards, copies=processes // shards, **options)
    if labels and not run.peft.trains_base:
        models.refuse_drawn_layers(base, model.name)
    return base


def check_model_and_data(parts: RunParts, base: nn.Module) -> None:
    """Check what depends on both model and data.

    Raises UsageError: early stopping without validation examples, a learning rate that would always be 0, or more
    processes than examples.
    """
    run, splits = parts.run, parts.splits
    refuse_idle(len(splits.train), Processes.current().count)
    refuse_no_learning(len(splits.train), run.model)
    if run.model.early_stopping_patience and not splits.validation:
        raise UsageError(
            f"model.early_stopping_patience={run.model.early_stopping_patience} needs validation examples, but there "
            "are none: raise dataset.validation_size, or set model.early_stopping_patience=0"
        )
    context = context_length(base)
    if run.model.max_length > context:
        print(f"note: model.max_length={run.model.max_length} exceeds the {context} positions of {run.model.name}")
