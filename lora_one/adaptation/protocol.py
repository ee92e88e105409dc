"""The interface of every kind of fine-tuning: LoRA, the r x r core, AdaLoRA and full fine-tuning, one class each."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import ClassVar

from safetensors.torch import save_file
from torch import Tensor, nn

from lora_one.config.methods import MethodSettings
from lora_one.config.schemas import ModelConfig


class Adaptation(ABC):
    """What one run trains in a base model, and how that is initialised, resumed, saved and merged.

    The abstract methods are required; the others have a default.

    artifact: folder of the run that contains the result of training.
    state_file: file in a resume point for ``state``.
    """

    artifact: ClassVar[str] = "adapter"
    state_file: ClassVar[str] = "adaptation.safetensors"

    def base_dtype(self, model: ModelConfig) -> str:
        """Return the dtype in which the base is loaded."""
        return "bf16" if model.bf16 else "fp32"

    @abstractmethod
    def layers(self, model: nn.Module, method: MethodSettings | None = None) -> dict[str, nn.Module]:
        """Return the layers to adapt, by name. model: may be a skeleton.

        Raises UsageError: see ``layers.target_layers``.
        """

    @abstractmethod
    def trainable_parameters(self, model: nn.Module) -> int:
        """Return how many parameters will be trained. model: the base or its skeleton."""

    @abstractmethod
    def start(self, base: nn.Module, steps: int) -> nn.Module:
        """Return the model to train, made from the base in place. steps: optimizer steps of the whole training."""

    @abstractmethod
    def save(self, model: nn.Module, place: Path, *, final: bool = True) -> None:
        """Write the trained model to a folder. final: training has ended, so the model may be modified."""

    def resume(self, base: nn.Module, steps: int) -> nn.Module:
        """Return the model of a run that is resumed; its trained values are then read from the resume point."""
        return self.start(base, steps)

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        """Return a scalar whose gradient is added to that of the loss once per optimizer step; None: nothing is.

        The value is not added, so that logged losses can be compared between methods.
        """
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Change the model after an optimizer step (counted from 0), while its gradients exist."""
        return None

    def saving_state(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the Trainer saves a resume point."""
        return nullcontext()

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that a resume point needs and the Trainer does not save, on the CPU."""
        return {}

    def save_state(self, model: nn.Module, folder: Path) -> None:
        """Add ``state`` to a resume point."""
        tensors = self.state(model)
        if tensors:
            save_file(tensors, folder / self.state_file)

    def load_state(self, model: nn.Module, folder: Path) -> bool:
        """Write the values of a resume point, ``state`` included, into the model; False: the Trainer loads them."""
        return False

    def untrained_base(self, model: nn.Module) -> nn.Module | None:
        """Return the base without its adapters, to merge the saved adapter into; None: it must be loaded again.

        The model cannot be used afterwards.
        """
        return None
