"""Resume a Trainer's checkpoint of a model whose base was changed: the base must be changed by the same factors."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from lora_one.adaptation.checkpoints import load_factors, save_factors
from lora_one.adaptation.layers import FactorPairs
from lora_one.adaptation.origin import origin_of
from lora_one.errors import RunError, UsageError
from lora_one.files import writing
from lora_one.types import AdapterFactors, LayerView

FILE = "initial_factors.safetensors"


def write_start(model: PeftModel, checkpoint: Path) -> None:
    """Add (B0, A0) of the changed layers to a checkpoint. Raises RunError: it cannot be written."""
    factors = origin_of(model).initial_factors
    if factors and checkpoint.is_dir():
        with writing(checkpoint / FILE):
            save_factors(factors, checkpoint / FILE)


def check_start(model: PeftModel, checkpoint: Path) -> None:
    """Raise RunError if the base of a model was not changed as the one that a checkpoint was trained with.

    Warns if the checkpoint does not contain the factors, and the base of the model was changed.
    """
    own = origin_of(model).initial_factors
    if (checkpoint / FILE).exists():
        different = differing(own, load_factors(checkpoint / FILE))
        if different:
            raise RunError(
                f"the checkpoint {checkpoint} was trained with another start: its initial factors of {different[0]} "
                f"({len(different)} layers in all) differ from those of this model, so the base weights differ, too. "
                f"Start the model with initialize_adapters(..., method=lora_one.start_of_checkpoint('{checkpoint}'))"
            )
    elif own:
        warnings.warn(
            f"{checkpoint / FILE} does not exist, so it cannot be checked that the resumed training has the same base "
            "weights: the method, its batches and its seed must be those of the first training",
            stacklevel=2,
        )


def differing(own: FactorPairs, others: FactorPairs) -> list[str]:
    """Return the layers whose factors are not equal, bit for bit."""

    def equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> bool:
        return all(torch.equal(mine.float(), other.float()) for mine, other in zip(ours, theirs, strict=True))

    names = sorted(own.keys() | others.keys())
    return [name for name in names if name not in own or name not in others or not equal(own[name], others[name])]


def start_of_checkpoint(checkpoint: Path | str) -> Callable[[LayerView, None], AdapterFactors]:
    """Return a method for ``initialize_adapters`` that changes the base as in the training of a checkpoint.

    Then resume with ``trainer.train(resume_from_checkpoint=checkpoint)``. No batches are needed, and the base is the
    same bit for bit, also if a GPU would compute slightly different factors. The LoraConfig and dtype must be the same.

    checkpoint: a folder of a Trainer with ``AdapterCallback``.
    Raises UsageError: it contains no initial factors, because the method did not change the base (then start as
    before), or because the Trainer had no ``AdapterCallback``.
    """
    file = Path(checkpoint).expanduser() / FILE
    factors = load_factors(file)
    if not factors:
        raise UsageError(
            f"{file} does not exist: the checkpoint's method did not change the base, or its Trainer had no "
            "AdapterCallback; call initialize_adapters with the same method, batches and seed instead"
        )

    def start_of_checkpoint(layer: LayerView, step: None) -> AdapterFactors:
        if layer.name not in factors:
            raise UsageError(f"{file} contains no factors of {layer.name}: pass the LoraConfig of the first training")
        return AdapterFactors(*factors[layer.name], shift_base=True)

    return start_of_checkpoint
