"""What every kind of fine-tuning answers: LoRA, the r x r core, AdaLoRA and full fine-tuning each in one class."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from lora_one.config.methods import MethodSettings
from lora_one.config.schemas import ModelConfig


class Adaptation:
    """What is trained in a base model, and how it starts, resumes, is saved and merged. An instance is of one run.

    artifact: the run's folder that holds the result of training.
    """

    artifact: ClassVar[str] = "adapter"

    def base_dtype(self, model: ModelConfig) -> str:
        """Return the dtype in which the base is loaded."""
        return "bf16" if model.bf16 else "fp32"

    def layers(self, model: nn.Module, method: MethodSettings | None = None) -> dict[str, nn.Module]:
        """Return the layers to adapt by name; works on a skeleton. Raises UsageError: see ``layers.target_layers``."""
        raise NotImplementedError

    def trainable_parameters(self, model: nn.Module) -> int:
        """Count the parameters that will train in a base model or its skeleton."""
        raise NotImplementedError

    def start(self, base: nn.Module, steps: int) -> nn.Module:
        """Return the model to train, made of the base in place. steps: optimizer steps of the whole training."""
        raise NotImplementedError

    def resume(self, base: nn.Module, steps: int) -> nn.Module:
        """Return the model of a run that goes on; its trained values come from the resume point."""
        return self.start(base, steps)

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        """Return what is added to the loss once per optimizer step, a scalar; None: nothing."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Act after an optimizer step (counted from 0), while its gradients exist."""

    def saving_state(self, model: nn.Module) -> AbstractContextManager[None]:
        """Surround the Trainer's saving of a resume point."""
        return nullcontext()

    def save_state(self, model: nn.Module, folder: Path) -> None:
        """Add to a resume point what the Trainer does not save."""

    def load_state(self, model: nn.Module, folder: Path) -> bool:
        """Write a resume point's values into the model; False: the Trainer is to load them."""
        return False

    def save(self, model: nn.Module, place: Path, *, final: bool = True) -> None:
        """Write the trained model to a folder. final: training is over, and the model may be consumed."""
        raise NotImplementedError

    def untrained_base(self, model: nn.Module) -> nn.Module | None:
        """Return the base without its adapters, to be merged with the saved one; None: it has to be loaded again.

        The model is consumed.
        """
        return None
