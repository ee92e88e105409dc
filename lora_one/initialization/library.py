"""Initialise adapters for your own training loop, from a model, a PEFT LoraConfig and batches."""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_one.adaptation.experts import warn_of_experts
from lora_one.adaptation.layers import ADAPTER, lora_layers, refuse_rank, refuse_shared
from lora_one.adaptation.origin import Origin, remember
from lora_one.adaptation.structure import Structure, unchanged_on_error
from lora_one.adaptation.wrapping import rank_pattern, with_cores, wrapped
from lora_one.config.methods import MethodSettings
from lora_one.errors import UsageError
from lora_one.initialization.choice import OwnMethod, Situation, chosen
from lora_one.initialization.given_batches import take
from lora_one.initialization.low_rank_step import StepSettings
from lora_one.initialization.methods import Method
from lora_one.initialization.ranked_start import solve_with_ranks
from lora_one.initialization.solution import Probe, Solution, Start
from lora_one.initialization.start import as_run_errors, place, solve, solve_by_peft
from lora_one.linalg import full_precision
from lora_one.losses import Batch
from lora_one.models import kind_of, never_repacked, original_weights


def initialize_adapters(
    model: nn.Module,
    config: LoraConfig,
    batches: Batch | Iterable[Batch] | None = None,
    *,
    method: str | OwnMethod = "LoRA-One",
    examples: int | None = 8,
    checkpointing: bool = False,
    seed: int = 42,
    on_start: Callable[[Start], None] | None = None,
    **settings: Any,
) -> PeftModel:
    """Wrap the model with PEFT and initialise the adapter of every linear layer by any method of ``init``.

    LoRA-One (arXiv:2502.01235, Algorithm 1): s B A = s/gamma [-G]_r / sigma_1(G), with PEFT's scaling s of that layer.
    If ``stable_gamma`` is set, it is gamma (published: 128). Otherwise (``scale="search"``, the default) gamma is the
    one with the lowest loss on the next ``examples`` of ``batches``, with a classification head on the next 32 at least
    (if there are not as many as ``examples``, on those of the gradient), found by a few forward passes. rank_pattern,
    alpha_pattern, use_rslora and use_dora are respected.

    Save with ``lora_one.save_adapter(model, path)``, or train with ``lora_one.AdapterCallback()`` in a Trainer: both
    write plain LoRA for the original base, also if the method has changed the base (LoRA-GA, PiSSA, ...) or trains
    only an r x r core (LoRA-SB, LoRA-XS). For such a model, ``model.save_pretrained`` warns.

    model: of transformers, causal, an encoder-decoder or with a classification head; it may be frozen, 4-bit or 8-bit.
    It is modified in place.
    batches: dictionaries of tensors as the model takes them, with ``labels`` (-100: no loss): one batch, a list, or a
    DataLoader. The first ``examples`` are used (None: all); the batch size does not change G. Methods that use no
    examples (LoRA, PiSSA, ...) ignore them.
    method: the name of a file in conf/init/ (``"lora_one"``, ``"pissa"``, ``"eva"``), or its title (``"LoRA-GA"``).
    Your own method is a function ``factors(layer, step)`` that returns ``lora_one.AdapterFactors(B, A)``: ``layer`` is
    a ``LayerView`` (shape, weight(), rank, scaling, generator), ``step`` the low-rank step of the layer's gradient G
    (U, S, Vh with [-G]_r = U diag(S) Vh), or None without batches.
    settings: keys of conf/init/<method>.yaml with other values than there, such as ``scale``, ``stable_gamma``,
    ``ga_direction``, ``tau``, ``eta`` (LoRA-SB: required), ``dtype`` of the adapter, ``memory``, ``tolerance``.
    checkpointing: store only the inputs of the model's blocks in the forward pass.
    on_start: called with the result (energies, losses, factors).

    The result does not depend on a torch.autocast region around the call. LoRA-SB sets alpha so that s = 1.

    Returns the PeftModel, for any optimizer or trainer. Several processes that train together get the same adapters if
    each passes the same batches.
    Raises UsageError: settings that contradict each other, a method that is not possible for this model (the message
    lists those that are), no linear layer, a rank above min(m, n), or batches without labels. RunError: a gradient is
    zero or not finite (the layer is named).
    """
    refuse_arguments(model, config)
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in settings.items()}  # of NumPy
    seed = seed.item() if hasattr(seed, "item") else seed
    way = chosen(method, plain, seed, situation_of(model, config, batches))
    init = way.settings
    probe = (
        probe_of(model, batches, examples, init, checkpointing) if init.needs_examples and batches is not None else None
    )
    warn_of_experts(model, ())
    if init.unit_scaling:
        config = dataclasses.replace(
            config, lora_alpha=config.r, use_rslora=False, alpha_pattern=dict(config.rank_pattern)
        )
    wrapper, start = wrapped_and_started(model, config, way, probe)
    remember(wrapper, origin_of(start, init))
    if on_start is not None:
        on_start(start)
    return wrapper


def refuse_arguments(model: nn.Module, config: LoraConfig) -> None:
    """Raise UsageError if the model or the LoraConfig cannot be used."""
    if isinstance(model, PeftModel):
        raise UsageError("model is already a PeftModel: pass the base model, such as model.unload() returns")
    if not isinstance(config, LoraConfig):
        raise UsageError(f"config is a {type(config).__name__}, but only a LoraConfig is supported: pass a LoraConfig")
    if kind_of(model).has_decoder and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise UsageError(
            f"model is a {type(model).__name__} without prepare_decoder_input_ids_from_labels, which computes the "
            "decoder's input: pass an encoder-decoder of transformers that has it"
        )
    if not isinstance(config.init_lora_weights, bool):
        raise UsageError(
            f"LoraConfig.init_lora_weights={config.init_lora_weights!r} selects another initialisation: remove it, "
            "and pass method=<name> to this function"
        )


def situation_of(model: nn.Module, config: LoraConfig, batches: Any) -> Situation:
    """Return the facts that decide which methods are possible."""
    return Situation(
        kind=kind_of(model),
        quantised=bool(getattr(model, "is_quantized", False)),
        dora=config.use_dora,
        bias=config.lora_bias,
        replicated=config.layer_replication is not None,
        ranks_by_layer=bool(config.rank_pattern),
        examples=batches is not None,
    )


def probe_of(model: nn.Module, batches: Any, examples: int | None, init: MethodSettings, checkpointing: bool) -> Probe:
    """Return the examples that the method uses. Raises UsageError: see ``take``."""
    own, others = take(model, batches, examples, further=init.search_from is not None)
    if not init.needs_gradient:
        return Probe(own, "example")
    return Probe(own, init.reduction, StepSettings.of(init, checkpointing=checkpointing), search=others)


def wrapped_and_started(
    model: nn.Module, config: LoraConfig, method: Method, probe: Probe | None
) -> tuple[PeftModel, Start]:
    """Wrap the model with PEFT and initialise its adapters; if that fails, the model is unchanged.

    Raises the errors of ``initialize_adapters``.
    """
    init = method.settings
    config = copy.deepcopy(config)  # PEFT changes the targets of some models in place
    with unchanged_on_error(model) as before, full_precision():
        try:
            wrapper = wrapped(model, config, init.dtype)
        except ValueError as error:  # no such target, or one that PEFT cannot wrap
            raise UsageError(f"LoraConfig: {' '.join(str(error).split())}") from error
        refuse_layers(wrapper, config, init)
        if init.sets_ranks:
            solution = solved_with_ranks(model, before, lora_layers(wrapper), config, method, probe)
            ranks = rank_pattern(solution.ranks, config.r)
            wrapper = wrapped(model, dataclasses.replace(config, rank_pattern=ranks), init.dtype)
        elif init.by_peft:
            layers = {name: layer.get_base_layer() for name, layer in lora_layers(wrapper).items()}
            before.restore()
            solution = solved_by_peft(never_repacked(model).requires_grad_(False), layers, config, method, probe)
            wrapper = wrapped(model, config, init.dtype)
        else:
            wrapper = with_cores(wrapper) if init.trains_core else wrapper
            solution = solve(wrapper, method, probe, init.seed, originals_of(model))
        return wrapper, place(wrapper, solution)


def solved_by_peft(
    base: nn.Module, layers: dict[str, nn.Module], config: LoraConfig, method: Method, probe: Probe | None
) -> Solution:
    """Return the factors that PEFT computes for these layers of the base."""

    def configure(**further: Any) -> LoraConfig:
        return dataclasses.replace(config, **further)

    return solve_by_peft(base, layers, configure, method, probe, method.settings.seed)


def solved_with_ranks(
    model: nn.Module,
    before: Structure,
    layers: dict[str, Any],
    config: LoraConfig,
    method: Method,
    probe: Probe | None,
) -> Solution:
    """Restore the bare model, and return the factors of a method that chooses the ranks. layers: PEFT's."""
    alphas = {name: layer.lora_alpha[ADAPTER] for name, layer in layers.items()}
    bare = {name: layer.get_base_layer() for name, layer in layers.items()}
    before.restore()

    def scaling(name: str, rank: int) -> float:
        return alphas[name] / (rank**0.5 if config.use_rslora else rank)

    with as_run_errors():
        return solve_with_ranks(model, bare, method, probe, method.settings.seed, config.r, scaling)


def originals_of(model: nn.Module) -> Callable[[str], Tensor] | None:
    """Return a function that reads the weight of a layer before quantisation; None: the model is not quantised."""
    if not getattr(model, "is_quantized", False):
        return None

    @cache
    def files() -> Callable[[str], Tensor]:
        return original_weights(model, model.config._name_or_path, getattr(model.config, "_commit_hash", None))

    return lambda layer: files()(layer)


def refuse_layers(wrapper: PeftModel, config: LoraConfig, init: MethodSettings) -> None:
    """Raise UsageError if the method cannot initialise the layers that the LoraConfig selects."""
    layers = lora_layers(wrapper)
    if wrapper.peft_config[ADAPTER].target_parameters:
        endings = sorted({name.rpartition(".")[2] for name in layers})
        raise UsageError(
            f"LoraConfig: in this model PEFT adapts the fused experts (target_parameters="
            f"{sorted(wrapper.peft_config[ADAPTER].target_parameters)}), which no method here initialises; names such "
            f"as gate_proj or all-linear select them: pass target_modules={endings}, its linear layers"
        )
    if not layers:
        raise UsageError(f"LoraConfig.target_modules={config.target_modules} matches no linear layer of this model")
    others = len(layers) < sum(isinstance(part, LoraLayer) for part in wrapper.modules())
    if others and (init.shifts_base or init.trains_core):
        raise UsageError(
            f"LoraConfig.target_modules={config.target_modules} selects layers that are not linear, for which "
            f"{init.title} is not defined: remove them, or pass method='LoRA-One'"
        )
    if init.shifts_base:
        refuse_shared(wrapper, layers)
    for name, layer in layers.items():
        if layer.get_base_layer().weight.is_meta:
            raise UsageError(
                f"the weight of {name} is on the meta device, so it has no values: load the model with its weights, "
                "and without offloading, before this call"
            )
        refuse_rank(name, layer.get_base_layer(), layer.r[ADAPTER], init, section="")


def origin_of(start: Start, init: MethodSettings) -> Origin:
    """Return what ``save_adapter`` needs to know about the start."""
    examples = start.solution.examples
    unread = {"method", "title", "cache", "bsz", "iters", "do_subsampling", "sub_size", "max_length", "needs_gradient"}
    keys = {key: value for key, value in dataclasses.asdict(init).items() if key not in unread}
    factors = {name: (B.cpu(), A.cpu()) for name, (B, A) in start.initial_factors.items()}
    return Origin(factors, init.title, keys, examples.examples if examples else 0)
