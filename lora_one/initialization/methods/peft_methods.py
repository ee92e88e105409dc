"""Methods that PEFT computes, by its own entry points and with our examples.

PEFT wraps the base, computes B and A and, for most methods, changes the base to W - s B A. We read the factors, remove
the wrapper and restore W. From then on, these methods are treated like the others.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_one.adaptation.structure import Structure
from lora_one.config.methods.base import PeftSettings
from lora_one.distributed import Processes
from lora_one.initialization.given_batches import one_by_one
from lora_one.initialization.gradients import zero_gradient
from lora_one.losses import IGNORED, Batch, batch_loss, model_logits
from lora_one.seeding import seeded
from lora_one.types import AdapterFactors

EVA_PASSES = 100  # maximal number of passes over the batches until the components must have converged
GA_SCALES = {"stable": "stable", "gd": "gd_scale", "unit": "unit", "weightS": "weight_svd"}  # our name -> PEFT's name


@dataclass(frozen=True)
class EntryPoint:
    """How PEFT computes a method.

    lora_config: returns settings of LoraConfig, from those of the method.  shift_base: the base becomes W - s B A.
    before, after: functions to call with the base and with the wrapped model, and the examples.
    """

    lora_config: Callable[[Any], dict[str, Any]]
    shift_base: bool = True
    before: Callable[[nn.Module, LoraConfig, Sequence[Batch]], None] | None = None
    after: Callable[[PeftModel, LoraConfig, Sequence[Batch]], None] | None = None


def factors_of_all_layers(
    settings: PeftSettings,
    base: nn.Module,
    layers: dict[str, nn.Linear],
    configure: Callable[..., LoraConfig],
    batches: Sequence[Batch],
    seed: int,
) -> dict[str, AdapterFactors]:
    """Return B (m, r) and A (r, n) of every layer, fp32, as PEFT initialises them; the base is not changed.

    configure: returns the LoraConfig of this adapter with further settings.
    PEFT uses the global random numbers, so they are seeded, and their states are restored at the end. Every process
    uses all examples, and the factors of the first process are taken.
    Raises ValueError: a weight or a factor is not finite, a layer is not used, the examples are not suitable, or PEFT
    computes something else for this kind of layer.
    """
    for name, layer in layers.items():
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"the weight of layer {name} contains values that are not finite")
    if settings.method == "olora" and any(isinstance(layer, Conv1D) for layer in layers.values()):
        raise ValueError("PEFT's OLoRA decomposes W^T in GPT-2's Conv1D layers, not W: choose another method")
    entry = ENTRY_POINTS[settings.method]
    config = configure(**entry.lora_config(settings))
    with restored(base, layers), seeded(seed):
        if entry.before:
            entry.before(base, config, batches)
        later = entry.after is not None  # it computes the factors, so nothing is allocated before
        with warnings.catch_warnings():  # PEFT uses a deprecated attribute of the model
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            model = get_peft_model(base, config, autocast_adapter_dtype=False, low_cpu_mem_usage=later)
        if entry.after:
            entry.after(model, config, batches)
        return {name: _read(name, model, entry) for name in layers}


@contextmanager
def restored(base: nn.Module, layers: dict[str, nn.Linear]) -> Iterator[None]:
    """Return a context at whose end the base has the structure and the layers the weights that they have now."""
    structure = Structure(base)
    weights = {name: layer.weight.detach().to("cpu", copy=True) for name, layer in layers.items()}
    try:
        yield
    finally:
        structure.restore()
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(weights[name])


def _read(name: str, model: PeftModel, entry: EntryPoint) -> AdapterFactors:
    """Return the factors of one layer, those of the first process. Raises ValueError: they are not finite."""
    layer = model.base_model.model.get_submodule(name)
    B, A = (part[model.active_adapter].weight.detach().float().clone() for part in (layer.lora_B, layer.lora_A))
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise ValueError(f"PEFT's factors of layer {name} are not finite")
    processes = Processes.current()
    return AdapterFactors(processes.from_owner(0, B), processes.from_owner(0, A), entry.shift_base)


def prepare_corda(base: nn.Module, config: LoraConfig, batches: Sequence[Batch]) -> None:
    """Compute the covariances of the layers' inputs over all tokens of the examples.

    Raises ValueError: a layer is not used.
    """
    from peft.tuners.lora.corda import preprocess_corda

    def run_model() -> None:
        for example in one_by_one(batches):
            model_logits(base, example)

    try:
        preprocess_corda(base, config, run_model=run_model)
    except ZeroDivisionError as error:
        raise ValueError(
            "the forward pass does not use one of the target layers: remove it from peft.lora_target_modules"
        ) from error


def prepare_lora_ga(base: nn.Module, config: LoraConfig, batches: Sequence[Batch]) -> None:
    """Compute the mean gradient of the examples' mean token losses, summed by PEFT in the weights' dtype; no dropout.

    Raises ValueError: the gradient of a layer is zero.
    """

    def train_step() -> None:
        base.eval()
        for example in one_by_one(batches):
            batch_loss(base, example, "example")[0].backward()

    with warnings.catch_warnings():  # PEFT's hooks only count calls, which also works without gradients of the inputs
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        preprocess_loraga(base, config, train_step)
    for name, layer in base.named_modules():
        gradient = getattr(layer, "_peft_loraga_grad", None)
        if gradient is not None and not gradient.any():
            raise zero_gradient(name)


def initialize_eva(model: PeftModel, config: LoraConfig, batches: Sequence[Batch]) -> None:
    """Compute the principal components of the layers' inputs at the answer tokens, batch by batch until convergence.

    Raises ValueError: no batch has enough answer tokens, or the components do not converge.
    """
    usable = [batch for batch in batches if int((batch["labels"] != IGNORED).sum()) > config.r]
    if not usable:
        raise ValueError(
            f"EVA needs a batch with more answer tokens than peft.lora_r={config.r}, but no batch has so many: raise "
            "init.bsz"
        )
    forward = LimitedForward(EVA_PASSES * len(usable))
    initialize_lora_eva_weights(
        model, usable, forward_fn=forward, gather_distributed_inputs=False, show_progress_bar=False
    )


@dataclass
class LimitedForward:
    """The forward pass that EVA calls for each batch. Raises ValueError: more than ``limit`` calls."""

    limit: int
    calls: int = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        self.calls += 1
        if self.calls > self.limit:
            raise ValueError(
                f"EVA's components have not converged after {EVA_PASSES} passes over the examples: lower init.tau or "
                "peft.lora_r, or raise init.bsz"
            )
        return model_logits(model, batch)


ENTRY_POINTS = {
    "pissa": EntryPoint(
        # niter=null is in pissa.py
        lambda settings: {
            "init_lora_weights": "pissa" if settings.niter == "exact" else f"pissa_niter_{settings.niter}"
        }
    ),
    "olora": EntryPoint(lambda settings: {"init_lora_weights": "olora"}),
    "eva": EntryPoint(
        # rho = 1: every layer keeps its configured rank
        lambda settings: {
            "init_lora_weights": "eva",
            "eva_config": EvaConfig(rho=1.0, tau=settings.tau, whiten=settings.whiten),
        },
        shift_base=False,
        after=initialize_eva,
    ),
    "corda": EntryPoint(
        lambda settings: {
            "init_lora_weights": "corda",
            "corda_config": CordaConfig(corda_method=settings.corda_method),
        },
        before=prepare_corda,
    ),
    "lora_ga_peft": EntryPoint(
        lambda settings: {
            "init_lora_weights": "lora_ga",
            "lora_ga_config": LoraGAConfig(settings.ga_direction, GA_SCALES[settings.scale], settings.gamma),
        },
        before=prepare_lora_ga,
    ),
}
