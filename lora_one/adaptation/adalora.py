"""AdaLoRA (arXiv:2303.10512): W + s/r P diag(L) Q; the layers share a budget of ranks, and the smallest L become zero.

PEFT implements the layers and allocates the budget. This file adds the schedule as shares of a run, the penalty for our
own loss, a state to resume from, and the conversion to plain LoRA factors at the end.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_one.adaptation.checkpoints import write_adapter
from lora_one.adaptation.layers import ADAPTER, FactorPairs, lora_layers
from lora_one.adaptation.lora import Lora
from lora_one.adaptation.wrapping import lora_config, widened, wrapped
from lora_one.config.schemas import PeftConfig

# Typical values of the paper's settings for GLUE (its Tables 8 and 9), which differ by task.
FIRST_RANK = 1.5  # rank before the budget is reduced, as a multiple of the final rank
WARM_UP, FINAL = 0.1, 0.5  # shares of the steps with the initial budget and with the final budget
EVERY = 10  # steps between two allocations
ORTHOGONAL = 0.1  # weight of the penalty


def wrap_adalora(base: nn.Module, peft: PeftConfig, dtype: str, steps: int, seed: int) -> PeftModel:
    """Wrap the base in AdaLoRA's layers with their initial values, P, Q ~ N(0, 0.02^2) drawn by the seed and L = 0.

    steps: optimizer steps of the whole training.
    """
    plain = lora_config(base, peft)
    config = AdaLoraConfig(
        init_r=first_rank(peft),
        target_r=peft.lora_r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        tinit=int(WARM_UP * steps),
        tfinal=int(FINAL * steps),
        deltaT=EVERY,
        orth_reg_weight=ORTHOGONAL,
        total_step=max(1, steps),
        target_modules=plain.target_modules,
        task_type=plain.task_type,
        fan_in_fan_out=plain.fan_in_fan_out,
        modules_to_save=plain.modules_to_save,
        ensure_weight_tying=plain.ensure_weight_tying,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = widened(wrapped(base, config, dtype))
    for layer in lora_layers(model).values():  # with a 16-bit base, PEFT makes this constant 16-bit and trainable
        ranks = layer.ranknum[ADAPTER].requires_grad_(False)
        ranks.data = ranks.data.float()
    return model


def first_rank(peft: PeftConfig) -> int:
    """Return the rank of every layer before the budget is reduced."""
    return max(peft.lora_r, round(FIRST_RANK * peft.lora_r))


def allocate(model: PeftModel, step: int) -> None:
    """Reallocate the budget after an optimizer step (counted from 0), while its gradients exist."""
    model.base_model.update_and_allocate(step)


def penalty(model: PeftModel) -> Tensor:
    """Return the mean of ||P^T P - I||_F and ||Q Q^T - I||_F over all layers, times its weight.

    That is PEFT's form; the paper's R(P, Q) has the squares of the norms, summed.
    """
    terms = []
    for layer in lora_layers(model).values():
        P, Q = layer.lora_B[ADAPTER], layer.lora_A[ADAPTER]
        for gram in (P.T @ P, Q @ Q.T):
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return model.peft_config[ADAPTER].orth_reg_weight * torch.stack(terms).mean()


PARTS = ("lora_A", "lora_B", "lora_E")
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def state(model: PeftModel) -> dict[str, Tensor]:
    """Return what changes from step to step: factors, averaged importances, and which ranks are in use."""
    tensors = {
        f"layer/{name}/{part}": getattr(layer, part)[ADAPTER].detach()
        for name, layer in lora_layers(model).items()
        for part in PARTS
    }
    allocator = model.base_model.rankallocator
    for average in AVERAGES:
        tensors |= {f"{average}/{name}": value.detach() for name, value in getattr(allocator, average).items()}
    pattern = model.peft_config[ADAPTER].rank_pattern or {}
    tensors |= {f"pattern/{name}": torch.tensor(used, dtype=torch.uint8) for name, used in pattern.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def load_state(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Write the tensors of ``state`` into a model that ``wrap_adalora`` made."""
    device = next(model.parameters()).device
    for name, layer in lora_layers(model).items():
        for part in PARTS:
            getattr(layer, part)[ADAPTER].copy_(tensors[f"layer/{name}/{part}"])
    of_kind: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        of_kind.setdefault(kind, {})[name] = tensor
    for average in AVERAGES:
        setattr(model.base_model.rankallocator, average, {n: t.to(device) for n, t in of_kind.get(average, {}).items()})
    pattern = {name: used.bool().tolist() for name, used in of_kind.get("pattern", {}).items()}
    model.peft_config[ADAPTER].rank_pattern = pattern or None


@contextmanager
def unpruned(model: nn.Module) -> Iterator[None]:
    """Let PEFT save the factors with all ranks, because those in use may be none in some layers."""
    config = model.peft_config[ADAPTER]
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def as_lora(model: PeftModel) -> tuple[LoraConfig, FactorPairs]:
    """Return the equivalent plain LoRA with s = 1: its configuration, and (B, A) of every layer in fp32."""
    config: Any = model.peft_config[ADAPTER]
    plain = LoraConfig(
        r=config.init_r,
        lora_alpha=config.init_r,
        target_modules=config.target_modules,
        task_type=config.task_type,
        fan_in_fan_out=config.fan_in_fan_out,
        modules_to_save=config.modules_to_save,
        ensure_weight_tying=config.ensure_weight_tying,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    factors = {}
    for name, layer in lora_layers(model).items():
        P, L, Q = (getattr(layer, part)[ADAPTER].detach().float() for part in ("lora_B", "lora_E", "lora_A"))
        s = layer.scaling[ADAPTER] / (float(layer.ranknum[ADAPTER]) + 1e-5)  # as in PEFT's forward pass
        factors[name] = (s * P * L.T, Q)
    return plain, factors


@dataclass(frozen=True)
class AdaLora(Lora):
    """The three factors P, L and Q of AdaLoRA, with their own initialisation.  seed: of its random numbers."""

    seed: int = 0

    state_file: ClassVar[str] = "adalora.safetensors"

    def parameters_of(self, m: int, n: int) -> int:
        return first_rank(self.peft) * (m + n + 1)

    def start(self, base: nn.Module, steps: int) -> nn.Module:
        return wrap_adalora(base, self.peft, self.dtype, steps, self.seed)

    def extra_loss(self, model: nn.Module) -> Tensor:
        return penalty(model)

    def after_step(self, model: nn.Module, step: int) -> None:
        allocate(model, step)

    def saving_state(self, model: nn.Module) -> AbstractContextManager[None]:
        return unpruned(model)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        return state(model)

    def load_state(self, model: nn.Module, folder: Path) -> bool:
        load_state(model, load_file(folder / self.state_file))
        return True

    def save(self, model: nn.Module, place: Path, *, final: bool = True) -> None:
        with unpruned(model):
            write_adapter(model, place, as_lora(model))
