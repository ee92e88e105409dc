"""The objects that the stages of a run share: its data, the initialisation examples, and what is trained."""

from dataclasses import dataclass

from torch import nn

from lora_one import models
from lora_one.adaptation.adalora import AdaLora
from lora_one.adaptation.full import FullFineTuning
from lora_one.adaptation.lora import Lora, LoraCore
from lora_one.adaptation.protocol import Adaptation
from lora_one.config import RunConfig
from lora_one.data import Splits, head_labels, load_dataset
from lora_one.data.encode import Encoder, encoder_for
from lora_one.distributed import Processes
from lora_one.errors import UsageError
from lora_one.evaluation.generate import context_length
from lora_one.evaluation.validation import Validation
from lora_one.initialization.low_rank_step import StepSettings
from lora_one.initialization.probe import init_seed, probe_batches
from lora_one.initialization.solution import Probe
from lora_one.records.folder import RunFolder
from lora_one.seeding import seed_everything
from lora_one.training.resume_points import check_resume_point, last_checkpoint
from lora_one.training.schedule import refuse_no_learning, total_steps


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
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return total_steps(len(self.splits.train), self.run.model)

    @property
    def resuming(self) -> bool:
        return last_checkpoint(self.folder.checkpoints) is not None


def adaptation_of(run: RunConfig, folder: RunFolder, tokenizer: object = None) -> Adaptation:
    """Return the adaptation (what is trained) that the configuration selects."""
    if not run.peft.use_peft:
        return FullFineTuning(tokenizer, run.model.bf16)
    if run.peft.adalora:
        return AdaLora(run.peft, run.init.dtype, folder.initial_factors, init_seed(run))
    kind = LoraCore if run.peft.lora_xs else Lora
    return kind(run.peft, run.init.dtype, folder.initial_factors)


def check_before_loading(run: RunConfig, folder: RunFolder) -> None:
    """Check the model's config.json and the run's folder before any data or weights are loaded.

    Raises RunError: the resume point is broken. UsageError: the model lacks the configured layers or positions.
    """
    if not run.overwrite:
        check_resume_point(folder.checkpoints)
    skeleton = models.load_skeleton(run.model.name, run.model.revision, run.model.type)
    adaptation_of(run, folder).layers(skeleton, run.init)
    models.check_positions(skeleton, run.model)


def load_parts(run: RunConfig, folder: RunFolder) -> RunParts:
    """Load the data of a run and draw the examples of its initialisation."""
    encoder = encoder_for(run.model, run.dataset)
    splits = load_dataset(run.dataset, encoder, run.model.max_length)
    validation = Validation(run, splits, encoder)
    probe = draw_probe(run, splits, encoder)
    return RunParts(run, folder, encoder, splits, validation, adaptation_of(run, folder, encoder.tokenizer), probe)


def draw_probe(run: RunConfig, splits: Splits, encoder: Encoder) -> Probe | None:
    """Return the examples that the method looks at and, for a gradient, how it is taken; None: it looks at none."""
    if not run.init.needs_examples:
        return None
    batches, others = probe_batches(run, splits.train_texts, encoder)
    if not run.init.needs_gradient:
        return Probe(batches, "example")
    settings = StepSettings(
        tolerance=run.init.tolerance, memory=run.init.memory, checkpointing=run.model.gradient_checkpointing
    )
    # the singular vectors of a transformed gradient are not the gradient's
    vectors = run.wandb.diagnostics_every > 0 and run.init.transform is None
    return Probe(batches, run.init.reduction, settings, vectors, others)


def load_base(parts: RunParts) -> nn.Module:
    """Load the base model for this run; a new classification head is drawn with the run's seed."""
    run, model = parts.run, parts.run.model
    labels = head_labels(model.type, run.dataset.name)
    options = {
        "dtype": parts.adaptation.base_dtype(model),
        "quantization": model.quantization,
        "model_type": model.type,
        "labels": labels,
        "pad_id": parts.encoder.pad_id,
    }
    shards = Processes.current().count if model.sharded else 1
    seed_everything(run.training_seed)  # a new head is drawn here
    base = models.load_model(model.name, model.revision, shards=shards, **options)
    if labels and run.peft.use_peft:
        models.refuse_drawn_layers(base, model.name)
    return base


def check_together(parts: RunParts, base: nn.Module) -> None:
    """Check what depends on both model and data.

    Raises UsageError: early stopping without validation examples, or a learning rate that would always be 0.
    """
    run, splits = parts.run, parts.splits
    refuse_no_learning(len(splits.train), run.model)
    if run.model.early_stopping_patience and not splits.validation:
        raise UsageError(
            f"model.early_stopping_patience={run.model.early_stopping_patience} needs validation examples, there are "
            "none: raise dataset.validation_size, or set it to 0"
        )
    context = context_length(base)
    if run.model.max_length > context:
        print(f"note: model.max_length={run.model.max_length} exceeds the {context} positions of {run.model.name}")
