"""What PEFT initialises itself: its own entry points, on our examples.

PEFT wraps the base, finds B and A and, for most methods, makes the base W - s B A. The factors are read, the wrapper
is removed and W restored; from there on these methods are treated like ours.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

from lora_one.config.methods.base import PeftSettings
from lora_one.distributed import Processes
from lora_one.losses import IGNORED, Batch, batch_loss, model_logits
from lora_one.seeding import seed_everything
from lora_one.types import AdapterFactors

EVA_PASSES = 100  # over the batches, after which components that still turn are given up
GA_SCALES = {"stable": "stable", "gd": "gd_scale", "unit": "unit", "weightS": "weight_svd"}  # ours, PEFT's


@dataclass(frozen=True)
class EntryPoint:
    """lora_config: settings of LoraConfig, from the method's.  shift_base: the base becomes W - s B A.

    before, after: what PEFT wants called on the bare model and on the wrapped one, with the examples.
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
    """B (m, r) and A (r, n) of every layer, fp32, as PEFT starts them; the base is left as it was.

    configure: LoraConfig of this adapter with further settings.  PEFT draws from the global random numbers, so they
    are seeded.  Every process looks at all examples; the first one's factors count.
    Raises ValueError: a weight or a factor that is not finite, a layer that takes no part, examples that do not do.
    """
    for name, layer in layers.items():
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"the weight of layer {name} holds values that are not finite")
    entry = ENTRY_POINTS[settings.method]
    config = configure(**entry.lora_config(settings))
    original = {name: layer.weight.detach().to("cpu", copy=True) for name, layer in layers.items()}
    was_training = base.training
    seed_everything(seed)
    if entry.before:
        entry.before(base, config, batches)
    later = entry.after is not None  # the factors come then, so nothing is allocated before
    with warnings.catch_warnings():  # PEFT still asks the model by an older name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model = get_peft_model(base, config, autocast_adapter_dtype=False, low_cpu_mem_usage=later)
    if entry.after:
        entry.after(model, config, batches)
    factors = {name: _read(name, model, entry) for name in layers}
    model.unload()
    base.train(was_training)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(original[name])
    return factors


def _read(name: str, model: PeftModel, entry: EntryPoint) -> AdapterFactors:
    layer = model.base_model.model.get_submodule(name)
    B, A = (part[model.active_adapter].weight.detach().float().clone() for part in (layer.lora_B, layer.lora_A))
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise ValueError(f"PEFT's factors of layer {name} are not finite")
    processes = Processes.current()
    return AdapterFactors(processes.from_owner(0, B), processes.from_owner(0, A), entry.shift_base)


def one_by_one(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Each example alone and without padding: CorDA's hook takes a batch's first dimension for one example, and the
    mean over equal examples is that of our own gradient."""
    for batch in batches:
        for row, real in enumerate(batch["attention_mask"].bool()):
            written = batch["labels"][row] != IGNORED  # what a decoder reads and writes has a padding of its own
            places = dict.fromkeys(("decoder_input_ids", "labels"), written) if "decoder_input_ids" in batch else {}
            yield {
                name: value[row : row + 1] if value.dim() == 1 else value[row][places.get(name, real)][None]
                for name, value in batch.items()
            }


def look_for_corda(base: nn.Module, config: LoraConfig, batches: Sequence[Batch]) -> None:
    """Covariances of the layers' inputs over all tokens of the examples."""
    from peft.tuners.lora.corda import preprocess_corda

    def run_model() -> None:
        for example in one_by_one(batches):
            model_logits(base, example)

    try:
        preprocess_corda(base, config, run_model=run_model)
    except ZeroDivisionError as error:
        raise ValueError("a target layer takes no part in the forward pass: leave it out") from error


def look_for_lora_ga(base: nn.Module, config: LoraConfig, batches: Sequence[Batch]) -> None:
    """Mean gradient of the examples' mean-token losses, summed by PEFT in the weights' dtype; dropout off."""

    def train_step() -> None:
        base.eval()
        for example in one_by_one(batches):
            batch_loss(base, example, "example")[0].backward()

    with warnings.catch_warnings():  # PEFT's hook counts calls; the first layers' inputs need no gradient for that
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        preprocess_loraga(base, config, train_step)
    for name, layer in base.named_modules():
        gradient = getattr(layer, "_peft_loraga_grad", None)
        if gradient is not None and not gradient.any():
            raise ValueError(f"the gradient of layer {name} is zero: nothing to start from")


def look_for_eva(model: PeftModel, config: LoraConfig, batches: Sequence[Batch]) -> None:
    """Principal components of the layers' inputs at the answers' tokens, updated batch by batch until they settle."""
    usable = [batch for batch in batches if int((batch["labels"] != IGNORED).sum()) > config.r]
    if not usable:
        raise ValueError(
            f"EVA needs more than peft.lora_r={config.r} answer tokens in a batch and no batch has them: raise init.bsz"
        )
    steps = 0

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal steps
        steps += 1
        if steps > EVA_PASSES * len(usable):
            raise ValueError(
                f"EVA's components still turn after {EVA_PASSES} passes over the examples: lower init.tau or "
                "peft.lora_r, or raise init.bsz"
            )
        return model_logits(model, batch)

    initialize_lora_eva_weights(
        model, usable, forward_fn=forward, gather_distributed_inputs=False, show_progress_bar=False
    )


ENTRY_POINTS = {
    "pissa": EntryPoint(
        # niter=null is our SVD, pissa.py
        lambda settings: {
            "init_lora_weights": "pissa" if settings.niter == "exact" else f"pissa_niter_{settings.niter}"
        }
    ),
    "olora": EntryPoint(lambda settings: {"init_lora_weights": "olora"}),
    "eva": EntryPoint(
        # rho = 1: every layer keeps the rank it was given
        lambda settings: {
            "init_lora_weights": "eva",
            "eva_config": EvaConfig(rho=1.0, tau=settings.tau, whiten=settings.whiten),
        },
        shift_base=False,
        after=look_for_eva,
    ),
    "corda": EntryPoint(
        lambda settings: {
            "init_lora_weights": "corda",
            "corda_config": CordaConfig(corda_method=settings.corda_method),
        },
        before=look_for_corda,
    ),
    "lora_ga_peft": EntryPoint(
        lambda settings: {
            "init_lora_weights": "lora_ga",
            "lora_ga_config": LoraGAConfig(settings.ga_direction, GA_SCALES[settings.scale], settings.gamma),
        },
        before=look_for_lora_ga,
    ),
}
