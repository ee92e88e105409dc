"""Wrap a base model in PEFT's layers, and remove them again."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_one.adaptation.core_modules import Core, Frozen
from lora_one.adaptation.layers import ADAPTER, lora_layers, target_layers
from lora_one.config.schemas import PeftConfig
from lora_one.models import DTYPES, kind_of, never_repacked


def lora_config(model: nn.Module, peft: PeftConfig, **further: Any) -> LoraConfig:
    """Return PEFT's configuration of the adapter: plain LoRA for every initialisation, so any PEFT version can load it.

    further: settings of an initialisation by PEFT, only while it runs.
    """
    layers = target_layers(model, peft)
    if peft.train_embeddings:
        further |= embeddings_to_train(model)
    endings = sorted({name.rpartition(".")[2] for name in layers})
    alike = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    return LoraConfig(
        r=peft.lora_r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        use_rslora=peft.use_rslora,
        use_dora=peft.dora,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        target_modules=endings if alike == set(layers) else sorted(layers),
        task_type=kind_of(model).task_type,
        **further,
    )


def embeddings_to_train(model: nn.Module) -> dict[str, Any]:
    """Return the settings with which PEFT trains copies of the input and output embeddings; tied ones stay tied."""
    words, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is not None and output.weight is words.weight
    trained = (words,) if tied or output is None else (words, output)
    names = [name for name, module in model.named_modules() if module in trained]
    return {"modules_to_save": names, "ensure_weight_tying": tied}


def parameters_trained_whole(model: nn.Module, peft: PeftConfig) -> int:
    """Return how many parameters are trained besides the adapters: embeddings, a new head. model: may be a skeleton."""
    names = embeddings_to_train(model)["modules_to_save"] if peft.train_embeddings else []
    heads = kind_of(model).head_modules
    names = [*names, *(name for name, _ in model.named_children() if name in heads)]
    return sum(weight.numel() for name in names for weight in model.get_submodule(name).parameters())


def wrap(base: nn.Module, peft: PeftConfig, dtype: str, ranks: Mapping[str, int] | None = None) -> PeftModel:
    """Wrap the base in adapters of that dtype; their values must be written afterwards.

    ranks: by layer; None: ``lora_r`` for all.
    """
    further = {"rank_pattern": rank_pattern(ranks, peft.lora_r)} if ranks else {}
    model = widened(wrapped(base, lora_config(base, peft, **further), dtype))
    return with_cores(model) if peft.lora_xs else model


def rank_pattern(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """Return PEFT's setting for the layers whose rank is not the usual one.

    PEFT compares a key with the end of a layer's name, so a name that ends another one is anchored.
    """
    return {
        f"^{name}" if any(other.endswith(f".{name}") for other in ranks) else name: rank
        for name, rank in ranks.items()
        if rank != usual
    }


def with_cores(model: PeftModel) -> PeftModel:
    """Return the model with a trained r x r core between frozen factors in every adapted linear layer."""
    for layer in lora_layers(model).values():
        layer.lora_B[ADAPTER] = Core(layer.lora_B[ADAPTER].weight.detach())
        layer.lora_A[ADAPTER] = Frozen(layer.lora_A[ADAPTER].weight.detach())
    return model


def wrapped(base: nn.Module, config: LoraConfig, dtype: str) -> PeftModel:
    """Return the base with the adapters of a PEFT configuration, in that dtype."""
    with quiet_peft():
        model = get_peft_model(never_repacked(base), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # other trainable parameters (a head, biases) keep the dtype of the base
            parameter.data = parameter.data.to(DTYPES[dtype])
    return model


def trained_copies(model: PeftModel) -> Iterator[nn.Module]:
    """Yield PEFT's copies of the modules that are trained besides the adapters: a new head, embeddings."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield from module.modules_to_save.values()


def widened(model: PeftModel) -> PeftModel:
    """Return the model, after converting its ``trained_copies`` to fp32; see ``widen``."""
    # all dtypes before any conversion, because tied modules share a weight
    narrow = {module: next(module.parameters()).dtype for module in trained_copies(model)}
    for module, dtype in narrow.items():
        widen(module, dtype)
    return model


def widen(module: nn.Module, narrow: torch.dtype) -> None:
    """Convert a 16-bit module to fp32, because 16 bits would round away small steps; its output remains ``narrow``."""
    if narrow not in (torch.bfloat16, torch.float16):
        return

    def wide(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    module.float()
    module.register_forward_pre_hook(wide)
    module.register_forward_hook(lambda *call: call[-1].to(narrow))


def narrowed(model: PeftModel) -> None:
    """Undo ``widen``: convert the trained copies back to the dtype of their originals."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            dtype = next(wrapper.original_module.parameters()).dtype
            for module in wrapper.modules_to_save.values():
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
                module.to(dtype)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Suppress two warnings that need no action.

    transformers warns that PEFT uses a deprecated attribute. PEFT warns that trainable biases are not reset when the
    adapters are switched off; before training they are equal to the base's.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias", category=UserWarning)
        yield
