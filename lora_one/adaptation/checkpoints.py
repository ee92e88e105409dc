"""Save and load adapters, as folders of plain PEFT."""

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from lora_one.adaptation.layers import ADAPTER, FactorPairs, lora_layers
from lora_one.adaptation.origin import has_core, origin_of
from lora_one.adaptation.wrapping import quiet_peft
from lora_one.errors import RunError, UsageError
from lora_one.files import synced, whole_files, write_whole
from lora_one.model_kinds import BY_TASK_TYPE, ModelKind
from lora_one.records.model_card import CardFacts, model_card

FACTORS = (".lora_A", ".lora_B", ".lora_E")
FILES = ("README.md", "adapter_model.safetensors")  # of an adapter's folder, besides adapter_config.json


PlainLora = tuple[LoraConfig | None, FactorPairs]  # configuration (None: as PEFT wrote it), (B, A) of every layer


def save_adapter(
    model: PeftModel,
    path: Path | str,
    initial_factors: FactorPairs | None = None,
    *,
    data: str | None = None,
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write the PEFT folder for the original base: adapter_config.json and the trained factors, bit for bit.

    For layers whose base became W - s B0 A0, the adapter is [B, -B0] [A; A0] of rank 2 r with the same s, so that the
    original base with this adapter is the trained model. A trained core is saved as (B R) A.

    path: the folder. An adapter in it is replaced, and other files stay.
    initial_factors: (B0, A0) by layer; None: those that ``initialize_adapters`` has stored with the model.
    data, results: for the model card README.md: a sentence about the training data, and measured values by name.
    Raises UsageError: the folder contains a README.md or weights that are not of an adapter. RunError: it
    cannot be written; an adapter in it is then unchanged.
    """
    path = folder_for_an_adapter(path)
    origin = origin_of(model)
    if initial_factors is None:
        initial_factors = origin.initial_factors
    if initial_factors:
        plain = for_the_original_base(model, initial_factors)
    else:
        plain = with_core_absorbed(model) if has_core(model) else None
    facts = CardFacts(
        method=origin.title,
        initialisation={"examples of the training data": origin.examples or None} | origin.settings,
        data={"training data": data},
        results=[("result", "value"), *((name, str(value)) for name, value in (results or {}).items())],
        revision=getattr(getattr(model.get_base_model(), "config", None), "_commit_hash", None),
        labels=getattr(getattr(model.get_base_model(), "config", None), "num_labels", None),
    )
    write_adapter(model, path, plain, facts)


def folder_for_an_adapter(path: Path | str) -> Path:
    """Return the absolute path of a folder that an adapter can be written to.

    Raises UsageError: it contains files with the names of an adapter's files, but no adapter.
    """
    folder = Path(path).expanduser().resolve()
    others = [name for name in FILES if (folder / name).exists()]
    if others and not (folder / "adapter_config.json").exists():
        raise UsageError(
            f"{path} contains {others[0]}, which would be replaced, but no adapter_config.json, so it is not the "
            "folder of an adapter: choose another folder"
        )
    return folder


def write_adapter(model: PeftModel, path: Path, plain: PlainLora | None = None, facts: CardFacts | None = None) -> None:
    """Write the PEFT folder. plain: equivalent plain LoRA factors to write instead of those that PEFT would write.

    facts: for the model card, which replaces PEFT's template.
    """
    with whole_files(path) as folder:
        type(model).save_pretrained(model, folder)
        if plain is not None:
            config, factors = plain
            if config is not None:
                config.save_pretrained(folder)
            _write_factors(factors, folder, shifted=config is not None)
        write_card(folder, facts or CardFacts())


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md of an adapter's folder, a model card with these facts."""
    config = json.loads((folder / "adapter_config.json").read_text())
    write_whole(folder / "README.md", model_card(config, facts))


def with_core_absorbed(model: PeftModel) -> PlainLora:
    """Return (B R, A) of every layer, computed in fp32, because rounding the product to 16 bits would lose digits."""
    factors = {}
    for name, layer in lora_layers(model).items():
        up = layer.lora_B[ADAPTER]
        factors[name] = (up.B.float() @ up.R.detach().float(), layer.lora_A[ADAPTER].weight.float())
    return None, factors


def _write_factors(factors: FactorPairs, folder: Path, shifted: bool) -> None:
    """Replace the factors in a folder written by PEFT with (B, A) of every layer, under the names that PEFT reads.

    shifted: the factors are for the original base, so a weight W - s B0 A0 that PEFT wrote (of an output layer) is
    removed. A trained bias of B stays.
    """
    file = folder / "adapter_model.safetensors"
    bases = {f"base_model.model.{name}.base_layer.weight" for name in factors} if shifted else set()
    others = {
        name: tensor
        for name, tensor in load_file(file).items()
        if name not in bases and (name.endswith(".lora_B.bias") or not any(part in name for part in FACTORS))
    }
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": factor.cpu().contiguous()
        for name, pair in factors.items()
        for letter, factor in zip("BA", pair, strict=True)
    }
    save_file(others | tensors, file, metadata={"format": "pt"})


def for_the_original_base(model: PeftModel, initial_factors: FactorPairs) -> PlainLora:
    """Return [B, -B0] and [A; A0] of every layer, and the configuration of rank 2 r with the same scaling."""
    config = copy.copy(model.peft_config[ADAPTER])
    wider = 2**0.5 if config.use_rslora else 2  # keeps s as it was at rank r
    config.r, config.lora_alpha = 2 * config.r, wider * config.lora_alpha
    config.rank_pattern = {layer: 2 * rank for layer, rank in config.rank_pattern.items()}
    config.alpha_pattern = {layer: wider * alpha for layer, alpha in config.alpha_pattern.items()}
    config.inference_mode = True
    factors = {}
    for name, layer in lora_layers(model).items():
        B, A = layer.lora_B[ADAPTER].weight.detach().cpu(), layer.lora_A[ADAPTER].weight.detach().cpu()
        # a layer whose base was not changed keeps its factors, padded with zeros
        B0, A0 = (
            start.to(B.dtype).cpu() for start in initial_factors.get(name, (torch.zeros_like(B), torch.zeros_like(A)))
        )
        factors[name] = (torch.cat([B, -B0], dim=1), torch.cat([A, A0], dim=0))
    return config, factors


def save_factors(initial_factors: FactorPairs, path: Path) -> None:
    """Write pairs (m, r), (r, n) by layer that a resumed run needs.

    They are (B0, A0), with which the base is shifted again, or the leading singular vectors of the gradients.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{letter}": factor.cpu().contiguous()
        for name, pair in initial_factors.items()
        for letter, factor in zip("BA", pair, strict=True)
    }
    scratch = path.with_suffix(".tmp")
    save_file(tensors, scratch)
    synced(scratch)
    scratch.replace(path)


def load_factors(path: Path) -> FactorPairs:
    """Return what ``save_factors`` wrote; {} if the file does not exist."""
    tensors = load_file(path) if path.exists() else {}
    names = sorted({key.rpartition(".")[0] for key in tensors})
    return {name: (tensors[f"{name}.B"], tensors[f"{name}.A"]) for name in names}


def kind_of_adapter(path: Path) -> ModelKind | None:
    """Return the kind of model that a saved adapter is for; None: its configuration does not contain it.

    Raises UsageError: the folder contains no adapter.
    """
    check_adapter(path)
    task = json.loads((path / "adapter_config.json").read_text()).get("task_type")
    return BY_TASK_TYPE.get(task)


def check_adapter(path: Path) -> None:
    """Raise UsageError if the folder contains no adapter."""
    if not (path / "adapter_config.json").exists():
        raise UsageError(f"{path} contains no adapter_config.json: pass the adapter/ folder of a run")


def load_adapter(base: nn.Module, path: Path) -> PeftModel:
    """Return the base with a saved adapter.

    Raises UsageError: the folder contains no adapter, or one that does not fit the base.
    """
    check_adapter(path)
    try:
        with quiet_peft():
            warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
            model = PeftModel.from_pretrained(base, str(path))
            # load the same values again, because from_pretrained does not report tensors that did not fit
            found = set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"))
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError(
            f"the adapter in {path} does not fit this model ({misfit(error)}): use the base that it was trained on, "
            f"{base_name(path)}"
        ) from error
    without, beyond = (sum("lora_" in name for name in names) for names in (found.missing_keys, found.unexpected_keys))
    if without or beyond:
        raise UsageError(
            f"the adapter in {path} does not fit this model ({beyond} of its tensors are not in the model, {without} "
            f"tensors of the model are not in it): use the base that it was trained on, {base_name(path)}"
        )
    return model


def misfit(error: Exception) -> str:
    """Return why an adapter could not be loaded, in one line."""
    text = " ".join(str(error).split())
    shapes = text.count("size mismatch for")
    return f"{shapes} of its tensors have other shapes" if shapes else text[:200]


def base_name(adapter: Path) -> str:
    """Return the name of the base in an adapter's configuration."""
    return (
        json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
        or "which it does not name"
    )


def restore_adapter(model: PeftModel, path: Path) -> None:
    """Write a resume point's values into the model's adapter, bit for bit and in place.

    PeftModel.load_adapter would convert 16-bit factors to fp32, as new parameters that the optimizer does not have.
    Raises RunError: the resume point contains another adapter.
    """
    tensors = load_file(path / "adapter_model.safetensors")
    if tensors.keys() != get_peft_model_state_dict(model).keys():
        raise RunError(
            f"the resume point {path} contains an adapter with other layers than this run: remove it, or add "
            "overwrite=true to start again"
        )
    set_peft_model_state_dict(model, tensors)
