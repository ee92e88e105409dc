"""The way in for people with their own training loop: a model, a PEFT LoraConfig and batches in, a PeftModel out."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Literal

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_one.adaptation.layers import ADAPTER, lora_layers, refuse_rank
from lora_one.adaptation.wrapping import unwrapped_on_error, wrapped
from lora_one.config import method_settings
from lora_one.config.aliases import DIRECTIONS
from lora_one.config.methods import METHODS, MethodSettings
from lora_one.config.rules import check_values
from lora_one.distributed import Processes
from lora_one.errors import UsageError, nearest
from lora_one.initialization.cache import content_of
from lora_one.initialization.gradients import without_autocast
from lora_one.initialization.holding import Memory
from lora_one.initialization.low_rank_step import StepSettings
from lora_one.initialization.methods import build_init
from lora_one.initialization.start import Probe, Start, place, solve, warn_of_experts
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
    """Wrap the model as PEFT would and start every linear layer's adapter from the one-step gradient.

    LoRA-One (arXiv:2502.01235, Algorithm 1): s B A = s/gamma [-G]_r / sigma_1(G), with s PEFT's own scaling of that
    layer. gamma is ``stable_gamma`` where given (published: 128). Otherwise (``scale="search"``, the default) it is the
    one of the least loss on the next ``examples`` of ``batches`` (on the gradient's own where there are not enough),
    found by a few forward passes. rank_pattern, alpha_pattern, use_rslora and use_dora are respected. LoRA-GA
    (arXiv:2407.05000) changes the base to W - s B A, so its adapter is saved with
    ``lora_one.save_adapter(model, path, start.initial_factors)``.

    model: of transformers, causal, an encoder-decoder or with a classification head; frozen, 4-bit or 8-bit too; it
    is modified in place.
    batches: dictionaries of tensors as the model takes them, with ``labels`` (-100 where nothing counts): a DataLoader,
    say. Taken in its order until ``examples`` are together (None: all of them); how they are batched never changes G.
    scale, stable_gamma, normalize, reduction, ga_direction, tolerance, memory: as in conf/init/gradient.yaml.
    checkpointing: keep only the inputs of the model's blocks in the forward pass.
    dtype: of the adapter.  on_start: told what was found (energies, losses, factors).

    A torch.autocast region around the call changes nothing: the start is found with autocast switched off.

    Returns the PeftModel, ready for any optimizer or trainer. Several processes that train together get the same
    adapters if each passes the same batches.
    Raises UsageError: settings that contradict each other, no linear layer, a rank beyond min(m, n), a quantised base
    for LoRA-GA, batches without labels. RunError: a gradient that is zero or not finite (the layer is named).
    """
    if isinstance(model, PeftModel):
        raise UsageError("model is a PeftModel already: give the model within, model.unload() or before PEFT wraps it")
    init = gradient_settings(
        dtype=dtype,
        seed=seed,
        direction=method,
        scale=scale,
        normalize=normalize,
        stable_gamma=stable_gamma,
        reduction=reduction,
        tolerance=tolerance,
        memory=memory,
        ga_direction=ga_direction,
    )
    refuse_settings(model, config, method)
    chosen = build_init(init)
    own, others = take(model, batches, examples, further=init.search_from is not None)
    settings = StepSettings(tolerance=tolerance, memory=memory, checkpointing=checkpointing)
    probe = Probe(own, reduction, settings, search=others)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        wrapper = wrapped(model, config, dtype)
    except ValueError as error:  # no such target, or one that PEFT cannot wrap
        raise UsageError(f"LoraConfig: {' '.join(str(error).split())}") from error
    warn_of_experts(wrapper.get_base_model())
    with unwrapped_on_error(wrapper, trained):
        layers = lora_layers(wrapper)
        if not layers:
            raise UsageError(f"LoraConfig.target_modules={config.target_modules} matches no linear layer of this model")
        if init.changes_base and len(layers) < sum(isinstance(part, LoraLayer) for part in wrapper.modules()):
            raise UsageError(
                f"LoraConfig.target_modules holds layers that are not linear, which {method}'s saved form has no place "
                "for: leave them out, or take method='LoRA-One'"
            )
        for name, layer in layers.items():
            refuse_rank(name, layer.get_base_layer(), layer.r[ADAPTER], init, section="")
        with without_autocast():
            start = place(wrapper, solve(wrapper, chosen, probe, seed))
    if on_start is not None:
        on_start(start)
    return wrapper


def gradient_settings(**given: Any) -> MethodSettings:
    """Return the checked settings of a gradient method, in the published spelling. Raises UsageError."""
    unread = dict.fromkeys(
        ("cache", "bsz", "iters", "sub_size", "max_length", "search_examples", "eta")
    )  # examples come from the caller's batches
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in given.items()}  # of NumPy
    init = method_settings({"mode": "gradient", "do_subsampling": False} | unread | plain)
    check_values({f"init.{name}": value for name, value in asdict(init).items()}, *init.value_rules())
    init.check()
    return init


def refuse_settings(model: nn.Module, config: LoraConfig, method: str) -> None:
    """What of the arguments cannot go together. Raises UsageError."""
    if not isinstance(config, LoraConfig):
        raise UsageError(f"config is a {type(config).__name__}: only the layers of a LoraConfig are started")
    if kind_of(model).has_decoder and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise UsageError(
            f"model is a {type(model).__name__}, which does not say what its decoder reads: give a model of "
            "transformers that has prepare_decoder_input_ids_from_labels"
        )
    if method not in SUPPORTED:
        raise UsageError(f"method={method} is not one of this function's; {nearest(method, SUPPORTED)}")
    if not isinstance(config.init_lora_weights, bool):
        raise UsageError(
            f"LoraConfig.init_lora_weights={config.init_lora_weights!r} asks PEFT for a start of its own: leave it out"
        )


def take(
    model: nn.Module, batches: Iterable[Batch], wanted: int | None, *, further: bool
) -> tuple[list[Batch], list[Batch] | None]:
    """Return the first batches with so many examples, the last one cut, and the next ones with as many.

    Each has what a decoder reads, where there is one. The second list is None unless ``further`` is set and the batches
    hold enough examples.
    Raises UsageError: there are none, or no labels as this kind of model has them.
    """
    if wanted is not None and wanted < 1:
        raise UsageError(f"examples={wanted} is out of range: at least 1, or None for all")
    taken: list[Batch] = []
    count, limit = 0, math.inf if wanted is None else wanted * (2 if further else 1)
    for batch in batches:
        taken.append(checked(model, batch))
        count += len(batch["labels"])
        if count >= limit:
            break
    own = rows_between(taken, 0, count if wanted is None else wanted)
    if not count:
        raise UsageError("batches: there are none to take a gradient of")
    if not any(loss_count(targets(batch), "token") for batch in own):
        raise UsageError("batches: every label is -100, so there is no loss: take examples with an answer")
    others = rows_between(taken, wanted, 2 * wanted) if further and count >= limit else None
    if others and not any(loss_count(targets(batch), "token") for batch in others):
        others = None
    contents = Processes.current().gathered(content_of([*own, *(others or ())]))
    if len(set(contents)) > 1:
        raise UsageError(
            "batches: the processes hold different ones, and each must pass all: give a loader that is not sharded"
        )
    if wanted is not None and count < wanted:
        warnings.warn(f"batches: {count} examples instead of the {wanted} asked for", stacklevel=3)
    return own, others


def checked(model: nn.Module, batch: Batch) -> Batch:
    """The batch with what a decoder reads. Raises UsageError: no labels, or not as this kind of model has them."""
    kind = kind_of(model)
    dimensions, form = kind.label_dimensions, "(batch,)" if kind.has_head else "(batch, length)"
    if "labels" not in batch:
        raise UsageError(f"batches: labels are missing among {', '.join(batch)}: the loss needs them")
    if batch["labels"].dim() != dimensions:
        raise UsageError(f"batches: labels have shape {tuple(batch['labels'].shape)}; this model's are {form}")
    if kind.has_decoder and "decoder_input_ids" not in batch:
        return dict(batch) | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
    return dict(batch)


def rows_between(batches: Iterable[Batch], first: int, end: int) -> list[Batch]:
    """The examples from number ``first`` up to ``end``, in the batches they came in."""
    found, count = [], 0
    for batch in batches:
        rows = len(batch["labels"])
        part = slice(max(0, first - count), max(0, end - count))
        if len(batch["labels"][part]):
            found.append({name: value[part] for name, value in batch.items()})
        count += rows
    return found
