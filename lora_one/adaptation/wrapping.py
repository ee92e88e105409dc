"""Wrap a base model in PEFT's layers, and take them off again."""

import warnings
from collections.abc import Iterator, Sequence
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
    """PEFT's configuration of the adapter: plain LoRA, whatever the initialisation, so any PEFT loads it.

    further: settings of one of PEFT's own initialisations, while it runs.
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
    """PEFT's settings that train input and output embeddings, in copies of its own; tied ones stay tied."""
    words, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is not None and output.weight is words.weight
    trained = (words,) if tied or output is None else (words, output)
    names = [name for name, module in model.named_modules() if module in trained]
    return {"modules_to_save": names, "ensure_weight_tying": tied}


def parameters_trained_whole(model: nn.Module, peft: PeftConfig) -> int:
    """Count the parameters that train whole beside the adapters: embeddings, a new head. Works on a skeleton."""
    names = embeddings_to_train(model)["modules_to_save"] if peft.train_embeddings else []
    heads = kind_of(model).head_modules
    names = [*names, *(name for name, _ in model.named_children() if name in heads)]
    return sum(weight.numel() for name in names for weight in model.get_submodule(name).parameters())


def wrap(base: nn.Module, peft: PeftConfig, dtype: str) -> PeftModel:
    """Wrap the base in adapters of that dtype, whose values are still to be written."""
    model = widened(wrapped(base, lora_config(base, peft), dtype))
    if peft.lora_xs:
        for layer in lora_layers(model).values():
            layer.lora_B[ADAPTER] = Core(layer.lora_B[ADAPTER].weight.detach())
            layer.lora_A[ADAPTER] = Frozen(layer.lora_A[ADAPTER].weight.detach())
    return model


def wrapped(base: nn.Module, config: LoraConfig, dtype: str) -> PeftModel:
    """The base with the adapters of a PEFT configuration, in that dtype."""
    with quiet_peft():
        model = get_peft_model(never_repacked(base), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # whatever else trains (a head, biases) keeps the base's
            parameter.data = parameter.data.to(DTYPES[dtype])
    return model


def trained_copies(model: PeftModel) -> Iterator[nn.Module]:
    """Whole modules that train beside the adapters (a new head, embeddings), which PEFT copies."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield from module.modules_to_save.values()


def widened(model: PeftModel) -> PeftModel:
    """The model, in which they train in fp32."""
    narrow = {module: next(module.parameters()).dtype for module in trained_copies(model)}  # tied ones share a weight
    for module, dtype in narrow.items():
        widen(module, dtype)
    return model


def widen(module: nn.Module, narrow: torch.dtype) -> None:
    """Train a 16-bit module in fp32, as steps are smaller than its digits; around it everything stays ``narrow``."""
    if narrow not in (torch.bfloat16, torch.float16):
        return

    def wide(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    module.float()
    module.register_forward_pre_hook(wide)
    module.register_forward_hook(lambda *call: call[-1].to(narrow))


def narrowed(model: PeftModel) -> None:
    """Undo ``widen``: the copies that trained are of their originals' dtype again."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            dtype = next(wrapper.original_module.parameters()).dtype
            for module in wrapper.modules_to_save.values():
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
                module.to(dtype)


@contextmanager
def unwrapped_on_error(model: PeftModel, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """A start that fails leaves the base as it was before PEFT wrapped it, when ``trained`` were to be trained."""
    try:
        yield
    except BaseException:
        model.unload()
        for parameter in trained:
            parameter.requires_grad_(True)
        raise


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT still asks a model by an older name, of which transformers warns; and it warns of biases that train, whose
    values are the base's own before training."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias", category=UserWarning)
        yield
