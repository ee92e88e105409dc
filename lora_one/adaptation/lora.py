"""LoRA (arXiv:2106.09685), plain or with DoRA's magnitudes, and the r x r core of LoRA-SB and LoRA-XS."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lora_one.adaptation.checkpoints import load_factors, restore_adapter, save_adapter
from lora_one.adaptation.layers import shift_base, target_layers
from lora_one.adaptation.merging import bare
from lora_one.adaptation.protocol import Adaptation
from lora_one.adaptation.wrapping import parameters_trained_whole, wrap
from lora_one.config.methods import MethodSettings
from lora_one.config.schemas import PeftConfig
from lora_one.models import weight_shape


@dataclass(frozen=True)
class Lora(Adaptation):
    """W + s B A: the factors B (m, r) and A (r, n) are trained, and with DoRA m magnitudes.

    dtype: of the adapter.  initial_factors: the file with (B0, A0) of the layers whose base became W - s B0 A0; it
    exists only if an initialisation method changed the base.
    """

    peft: PeftConfig
    dtype: str
    initial_factors: Path

    def layers(self, model: nn.Module, method: MethodSettings | None = None) -> dict[str, nn.Module]:
        return target_layers(model, self.peft, method)

    def trainable_parameters(self, model: nn.Module) -> int:
        shapes = map(weight_shape, self.layers(model).values())
        return sum(self.parameters_of(m, n) for m, n in shapes) + parameters_trained_whole(model, self.peft)

    def parameters_of(self, m: int, n: int) -> int:
        """Return how many parameters are trained in a layer of shape (m, n)."""
        return self.peft.lora_r * (m + n) + m * self.peft.dora

    @property
    def ranks_file(self) -> Path:
        """Return the file with the rank of each layer; it exists only if an initialisation method chose them."""
        return self.initial_factors.with_name("ranks.json")

    def start(self, base: nn.Module, steps: int, ranks: Mapping[str, int] | None = None) -> nn.Module:
        """Return the wrapped base. ranks: by layer; None: ``lora_r`` for all."""
        return wrap(base, self.peft, self.dtype, ranks)

    def resume(self, base: nn.Module, steps: int) -> nn.Module:
        chosen = {"ranks": json.loads(self.ranks_file.read_text())} if self.ranks_file.exists() else {}
        model = self.start(base, steps, **chosen)
        shift_base(model, load_factors(self.initial_factors))
        return model

    def load_state(self, model: nn.Module, folder: Path) -> bool:
        restore_adapter(model, folder)
        return True

    def save(self, model: nn.Module, place: Path, *, final: bool = True) -> None:
        save_adapter(model, place, load_factors(self.initial_factors))

    def untrained_base(self, model: nn.Module) -> nn.Module | None:
        if self.initial_factors.exists():  # the base in memory is W - s B0 A0, rounded, but the adapter is for W
            model.to("meta")  # frees this copy before the original is loaded
            return None
        return bare(model)


class LoraCore(Lora):
    """W + s B R A: only the core R (r, r) is trained, between frozen factors (arXiv:2411.19557, arXiv:2405.17604)."""

    def parameters_of(self, m: int, n: int) -> int:
        return self.peft.lora_r**2
