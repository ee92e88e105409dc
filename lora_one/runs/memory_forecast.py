"""Forecast the memory of activations and of the optimizer, without weights, data or a device."""

import copy
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from lora_one.adaptation.experts import fused_experts
from lora_one.config.optimizers import OptimizerConfig
from lora_one.initialization.backward import blocks_of, gradients_from_the_embeddings
from lora_one.initialization.moments import sharing_inputs
from lora_one.model_kinds import MODEL_KINDS
from lora_one.models import auto_class


def state_bytes(optimizer: OptimizerConfig, trainable: int, shapes: Collection[tuple[int, int]]) -> int:
    """Return the bytes of what training keeps for its trainable parameters, all in fp32.

    shapes: (m, n) of the adapted layers, whose adapters are weights, gradients and two moments; without layers every
    weight of the base is trained, and counted elsewhere. With full-size moments there are also two matrices of the
    size of each adapted weight, and two of the largest one within a step.
    """
    if not shapes:
        return 12 * trainable
    sizes = [m * n for m, n in shapes]
    return 16 * trainable + 8 * (sum(sizes) + max(sizes)) * optimizer.full_size_moments


def activation_bytes(
    config: Any,
    kind: str,
    targets: Iterable[str] | None,
    rows: int,
    length: int,
    dtype: torch.dtype,
    *,
    checkpointing: bool = False,
) -> int:
    """Return the bytes that the forward pass of ``rows`` examples of ``length`` tokens keeps for the backward pass.

    The pass runs on fake tensors, which have a shape but no data, so it takes about a second even for 7B parameters;
    it is done once for equal arguments, such as those of the jobs of a sweep.
    targets: dotted names of the adapted layers, whose inputs are kept; None: every weight is trained.
    checkpointing: only the inputs of the blocks are kept, and all tensors of the largest block.
    """
    layers = None if targets is None else tuple(targets)
    key = (config.to_json_string(use_diff=False), kind, layers, rows, length, dtype, checkpointing)
    if key not in _forecasts:
        with FakeTensorMode():
            model = _fake(config, kind, dtype).requires_grad_(targets is None)
            if dtype != torch.bfloat16 and fused_experts(model):  # their product of tensors without data wants bf16
                narrow = (config, kind, layers, rows, length, torch.bfloat16)
                return activation_bytes(*narrow, checkpointing=checkpointing) * dtype.itemsize // 2
            ids = torch.zeros(rows, length, dtype=torch.long)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if MODEL_KINDS[kind].has_decoder:
                batch["decoder_input_ids"] = ids
            _forecasts[key] = _kept(model, batch, list(layers or ()), checkpointing=checkpointing)
    return _forecasts[key]


_forecasts: dict[tuple[Any, ...], int] = {}  # arguments of activation_bytes -> its result


def groups_of_inputs(config: Any, kind: str, targets: Iterable[str]) -> list[list[str]]:
    """Return the adapted layers in groups that get the same input, see ``initialization.moments.sharing_inputs``."""
    with FakeTensorMode():
        model = _fake(config, kind, torch.bfloat16).requires_grad_(False)
        ids = torch.zeros(1, 8, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if MODEL_KINDS[kind].has_decoder:
            batch["decoder_input_ids"] = ids
        return sharing_inputs(model, {name: model.get_submodule(name) for name in targets}, batch)


def _fake(config: Any, kind: str, dtype: torch.dtype) -> nn.Module:
    with no_init_weights():  # some vision towers read the weights that they have drawn
        model = auto_class(kind).from_config(copy.deepcopy(config), dtype=dtype)
    model.tie_weights()
    return model


def _kept(model: nn.Module, batch: dict[str, torch.Tensor], targets: list[str], *, checkpointing: bool) -> int:
    """Return the bytes of the tensors that the forward pass of a batch keeps, without the model's own tensors."""
    own = {part.untyped_storage()._cdata for part in (*model.parameters(), *model.buffers())}
    outside: dict[int, torch.Tensor] = {}  # by storage; the reference prevents that its address is used again
    inside: list[dict[int, torch.Tensor]] = []
    places = [outside]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own and not any(storage in place for place in places):
            places[-1][storage] = tensor
        return tensor

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        for tensor in inputs:
            if isinstance(tensor, torch.Tensor):
                keep(tensor)
        inside.append({})
        places.append(inside[-1])

    def read(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        keep(inputs[0])

    def leave(*_: Any) -> None:
        places.pop()

    with ExitStack() as stack:
        stack.enter_context(gradients_from_the_embeddings(model) if targets else torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        handles = []
        for block in blocks_of(model) if checkpointing else ():
            handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
        handles += [model.get_submodule(name).register_forward_pre_hook(read) for name in targets]
        for handle in handles:
            stack.callback(handle.remove)
        model(**batch, use_cache=False)
    blocks = [sum(map(size_of, block.values())) for block in inside]
    return sum(map(size_of, outside.values())) + max(blocks, default=0)


def size_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()
