"""Initialise adapters for your own training loop, from a model, a PEFT LoraConfig and batches."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_one.adaptation.layers import ADAPTER, lora_layers, refuse_rank
from lora_one.adaptation.wrapping import unwrapped_on_error, wrapped
from lora_one.config import method_settings
from lora_one.config.aliases import DIRECTIONS
from lora_one.config.methods import METHODS, MethodSettings
from lora_one.distributed import Processes
from lora_one.errors import UsageError, nearest
from lora_one.initialization.cache import content_of
from lora_one.initialization.gradients import without_autocast
from lora_one.initialization.holding import Memory
from lora_one.initialization.low_rank_step import StepSettings
from lora_one.initialization.methods import build_init
from lora_one.initialization.solution import Probe, Start
from lora_one.initialization.start import place, solve, warn_of_experts
from lora_one.losses import Batch, Reduction, loss_count, targets
from lora_one.models import kind_of

SUPPORTED = tuple(title for title, name in DIRECTIONS.items() if not METHODS[name].trains_core)


def initialize_adapters(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Batch],
    *,
    method: str = "LoRA-One",
    examples: int | None = 8,
    scale: str | None = None,
    stable_gamma: float | None = None,
    normalize: Literal["s0", "none"] = "s0",
    reduction: Reduction = "example",
    ga_direction: str = "ArB2r",
    tolerance: float = 1e-3,
    memory: Memory = "auto",
    checkpointing: bool = False,
    dtype: Literal["fp32", "bf16"] = "fp32",
    seed: int = 42,
    on_start: Callable[[Start], None] | None = None,
) -> PeftModel:
    """Wrap the model with PEFT and initialise every linear layer's adapter from the one-step gradient.

    LoRA-One (arXiv:2502.01235, Algorithm 1): s B A = s/gamma [-G]_r / sigma_1(G), with PEFT's scaling s of that layer.
    If ``stable_gamma`` is set, it is gamma (published: 128). Otherwise (``scale="search"``, the default) gamma is the
    one with the lowest loss on the next ``examples`` of ``batches`` (if there are not enough, on those of the
    gradient), found by a few forward passes. rank_pattern, alpha_pattern, use_rslora and use_dora are respected.
    LoRA-GA (arXiv:2407.05000) changes the base to W - s B A, so save its adapter with
    ``lora_one.save_adapter(model, path, start.initial_factors)``.

    model: of transformers, causal, an encoder-decoder or with a classification head; it may be frozen, 4-bit or 8-bit.
    It is modified in place.
    batches: dictionaries of tensors as the model takes them, with ``labels`` (-100: no loss), such as a DataLoader. The
    first ``examples`` are used (None: all); the batch size does not change G.
    scale, stable_gamma, normalize, reduction, ga_direction, tolerance, memory: see conf/init/gradient.yaml.
    checkpointing: store only the inputs of the model's blocks in the forward pass.
    dtype: of the adapter.  on_start: called with the result (energies, losses, factors).

    The result does not depend on a torch.autocast region around the call.

    Returns the PeftModel, for any optimizer or trainer. Several processes that train together get the same adapters if
    each passes the same batches.
    Raises UsageError: settings that contradict each other, no linear layer, a rank above min(m, n), a quantised base
    for LoRA-GA, or batches without labels. RunError: a gradient is zero or not finite (the layer is named).
    """
    refuse_arguments(model, config, method)
    init = gradient_settings(
        direction=method,
        scale=scale,
        stable_gamma=stable_gamma,
        normalize=normalize,
        reduction=reduction,
        ga_direction=ga_direction,
        tolerance=tolerance,
        memory=memory,
        dtype=dtype,
        seed=seed,
    )
    own, others = take(model, batches, examples, further=init.search_from is not None)
    settings = StepSettings(tolerance=tolerance, memory=memory, checkpointing=checkpointing)
    warn_of_experts(model)
    wrapper, start = wrapped_and_started(model, config, init, Probe(own, reduction, settings, search=others))
    if on_start is not None:
        on_start(start)
    return wrapper


def refuse_arguments(model: nn.Module, config: LoraConfig, method: str) -> None:
    """Raise UsageError if the model, the LoraConfig or the method cannot be used."""
    if isinstance(model, PeftModel):
        raise UsageError("model is already a PeftModel: pass the base model, such as model.unload() returns")
    if not isinstance(config, LoraConfig):
        raise UsageError(f"config is a {type(config).__name__}, but only a LoraConfig is supported: pass a LoraConfig")
    if kind_of(model).has_decoder and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise UsageError(
            f"model is a {type(model).__name__} without prepare_decoder_input_ids_from_labels, which computes the "
            "decoder's input: pass an encoder-decoder of transformers that has it"
        )
    if method not in SUPPORTED:
        raise UsageError(f"method={method} is not supported by this function; {nearest(method, SUPPORTED)}")
    if not isinstance(config.init_lora_weights, bool):
        raise UsageError(
            f"LoraConfig.init_lora_weights={config.init_lora_weights!r} selects another initialisation: remove it"
        )


def gradient_settings(**given: Any) -> MethodSettings:
    """Return the checked settings of a gradient method, given in the published spelling. Raises UsageError."""
    unread = dict.fromkeys(
        ("cache", "bsz", "iters", "sub_size", "max_length", "search_examples", "eta")
    )  # the examples come from the caller's batches
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in given.items()}  # of NumPy
    init = method_settings({"mode": "gradient", "do_subsampling": False} | unread | plain)
    init.check_values()
    init.check()
    return init


def wrapped_and_started(
    model: nn.Module, config: LoraConfig, init: MethodSettings, probe: Probe
) -> tuple[PeftModel, Start]:
    """Wrap the model with PEFT and initialise its adapters; if that fails, the model is unchanged.

    Raises the errors of ``initialize_adapters``.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        wrapper = wrapped(model, config, init.dtype)
    except ValueError as error:  # no such target, or one that PEFT cannot wrap
        raise UsageError(f"LoraConfig: {' '.join(str(error).split())}") from error
    with unwrapped_on_error(wrapper, trained), without_autocast():
        refuse_layers(wrapper, config, init)
        return wrapper, place(wrapper, solve(wrapper, build_init(init), probe, init.seed))


def refuse_layers(wrapper: PeftModel, config: LoraConfig, init: MethodSettings) -> None:
    """Raise UsageError if the method cannot initialise the layers that the LoraConfig selects."""
    layers = lora_layers(wrapper)
    if not layers:
        raise UsageError(f"LoraConfig.target_modules={config.target_modules} matches no linear layer of this model")
    if init.changes_base and len(layers) < sum(isinstance(part, LoraLayer) for part in wrapper.modules()):
        raise UsageError(
            f"LoraConfig.target_modules={config.target_modules} selects layers that are not linear, which cannot be "
            f"saved with {init.title}: remove them, or pass method='LoRA-One'"
        )
    for name, layer in layers.items():
        refuse_rank(name, layer.get_base_layer(), layer.r[ADAPTER], init, section="")


def take(
    model: nn.Module, batches: Iterable[Batch], wanted: int | None, *, further: bool
) -> tuple[list[Batch], list[Batch] | None]:
    """Return batches of the first ``wanted`` examples, and of as many following ones; None: all examples.

    The second list is None unless ``further`` is set and there are enough examples. The batches of an encoder-decoder
    get decoder_input_ids.
    Raises UsageError: there are no examples, or no labels in the form that this kind of model needs.
    """
    if wanted is not None and wanted < 1:
        raise UsageError(f"examples={wanted} is out of range: it must be at least 1, or None for all examples")
    taken: list[Batch] = []
    count, limit = 0, math.inf if wanted is None else wanted * (2 if further else 1)
    for batch in batches:
        taken.append(checked(model, batch))
        count += len(batch["labels"])
        if count >= limit:
            break
    own = rows_between(taken, 0, count if wanted is None else wanted)
    if not count:
        raise UsageError("batches contains no examples to compute a gradient from: pass at least one batch")
    if not any(loss_count(targets(batch), "token") for batch in own):
        raise UsageError("batches: every label is -100, so there is no loss; pass examples that contain an answer")
    others = rows_between(taken, wanted, 2 * wanted) if further and count >= limit else None
    if others and not any(loss_count(targets(batch), "token") for batch in others):
        others = None
    contents = Processes.current().gathered(content_of([*own, *(others or ())]))
    if len(set(contents)) > 1:
        raise UsageError(
            "batches: they differ between processes, but each process must pass the same ones; use a data loader that "
            "is not sharded"
        )
    if wanted is not None and count < wanted:
        warnings.warn(f"batches contains {count} examples, fewer than examples={wanted}: all are used", stacklevel=3)
    return own, others


def checked(model: nn.Module, batch: Batch) -> Batch:
    """Return the batch, for an encoder-decoder with decoder_input_ids.

    Raises UsageError: it has no labels, or not in the form that this kind of model needs.
    """
    kind = kind_of(model)
    dimensions, form = kind.label_dimensions, "(batch,)" if kind.has_head else "(batch, length)"
    if "labels" not in batch:
        raise UsageError(f"batches: a batch has {', '.join(batch)} but no labels, which the loss needs: add them")
    if batch["labels"].dim() != dimensions:
        raise UsageError(
            f"batches: labels have shape {tuple(batch['labels'].shape)}, but this kind of model needs {form}"
        )
    if kind.has_decoder and "decoder_input_ids" not in batch:
        return dict(batch) | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
    return dict(batch)


def rows_between(batches: Iterable[Batch], first: int, end: int) -> list[Batch]:
    """Return the examples from number ``first`` up to, not including, ``end``, in their original batches."""
    found, count = [], 0
    for batch in batches:
        rows = len(batch["labels"])
        part = slice(max(0, first - count), max(0, end - count))
        if len(batch["labels"][part]):
            found.append({name: value[part] for name, value in batch.items()})
        count += rows
    return found
