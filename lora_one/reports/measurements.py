"""What a report reads of a finished run, from its run.json and metrics.jsonl."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from lora_one.files import read_lines
from lora_one.records.folder import RunFolder, revision_in

Record = dict[str, Any]
NOT_DATA = {"path", "cache"}  # keys of a data set's configuration that do not choose examples; path: see its hash


def measurements(folder: RunFolder, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``compare.Run`` that a finished run measured itself. record: its run.json."""
    final, start, train = record["evaluation"].get("final", {}), record["init"], record["train"]
    return {
        "validation_loss": final.get("eval_loss"),
        "init_seconds": start["seconds"],
        "train_seconds": train["seconds"],
        "steps": train["steps"],
        "tokens": train["tokens"],
        "trainable_parameters": record["trainable_parameters"],
        "peak_memory_bytes": record.get("peak_memory_bytes"),
        "git_commit": record["provenance"]["git_commit"],
        "warnings": tuple(start.get("warnings", ())),
        "history": tuple(history(read_lines(folder.metrics, "eval_loss"))),
        "start": start_figures(start),
        "adapters": adapter_figures(read_lines(folder.path / "diagnostics.jsonl")),
        "identity": identity(record),
    }


def history(lines: Sequence[Record]) -> list[dict[str, float | None]]:
    """Return epoch, loss and accuracy of each validation; epoch 0 is the one after the initialisation."""
    return [
        {"epoch": line.get("epoch", 0.0), "loss": line["eval_loss"], "accuracy": line.get("eval_accuracy")}
        for line in lines
        if "eval_loss" in line
    ]


def start_figures(start: Record) -> dict[str, float]:
    """Return the figures of a start, from the entry ``init`` of run.json; those that it does not have are left out.

    captured_energy: share of ||G||^2 in the leading r singular values, mean over the layers.
    shift: ||s B A|| / ||W||, the largest one of the layers.
    loss_before, loss_after: on the examples of the start, in nats.  gamma: the scale that was found or given.
    """
    energy, shifts = start.get("captured_energy") or {}, start.get("relative_shift") or {}
    found = {
        "captured_energy": energy.get("mean"),
        "shift": max(shifts.values(), default=None),
        "loss_before": start.get("loss_before"),
        "loss_after": start.get("loss_after"),
        "gamma": (start.get("searched") or {}).get("gamma"),
    }
    return {name: value for name, value in found.items() if value is not None}


def identity(record: Record) -> dict[str, Any]:
    """Return what must be the same in all runs of a comparison, by the name under which a report shows it."""
    provenance, config = record["provenance"], record["config"]
    prints = provenance["fingerprints"]
    train = record["data"]["train"]
    newer = {name: provenance[name] for name in ("code", "machine") if "code" in provenance}  # not of earlier versions
    return {
        "model": prints.get("model.name", f"{config['model']['name']}, revision {revision_in(record)}"),
        "data": prints.get("dataset.path", config["dataset"]["name"]),
        "training examples": train["whole"] + train["shortened"],
        "settings of the data": digest({key: value for key, value in config["dataset"].items() if key not in NOT_DATA}),
        "maximum length": config["model"].get("max_length"),
        "epochs": config["model"]["epochs"],
        "examples per step": config["model"]["real_batch_size"],
        "loss": config["model"]["loss"],
        "weights of the base": weights_of_base(config),
        "loss on the prompt": "yes" if config["dataset"].get("train_on_inputs") else "no",
        "processes": record["train"].get("processes", 1),
        "configuration": record["config_hash"],
        "versions": provenance["versions"],
        "method": active_method(record),
        **newer,
    }


def weights_of_base(config: Record) -> str:
    """Return the format of the base's weights in training; full fine-tuning keeps them in fp32."""
    model, peft = config["model"], config["peft"]
    return model.get("quantization") or ("bf16" if model.get("bf16") and peft["use_peft"] else "fp32")


def active_method(record: Record) -> str:
    """Return which start, adapter and optimizer a run had, as its run.json records them."""
    config = record["config"]
    peft = config["peft"]
    kinds = {"rsLoRA": "use_rslora", "DoRA": "dora", "r x r core": "lora_xs", "trained embeddings": "train_embeddings"}
    parts = [name for name, key in kinds.items() if peft.get(key) and not (peft.get("adalora") and name == "rsLoRA")]
    if peft.get("use_loraplus"):
        parts.append(f"learning rate of B x {peft['loraplus_lr_ratio']:g}")
    of_layers = " on average" if record["init"].get("ranks") else ""  # GoRA chooses the rank of each layer
    adapter = [f"r {peft['lora_r']}{of_layers}", f"alpha {peft['lora_alpha']:g}", *parts] if peft["use_peft"] else []
    return ", ".join([record["init"]["method"], *adapter, config["optimizer"]["name"]])


def digest(value: Any) -> str:
    """Return a sha256 (hex) of plain JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def adapter_figures(lines: Sequence[Record]) -> dict[str, Any]:
    """Return the figures of the adapters after training, from the last line of diagnostics.jsonl; {}: it has none.

    spectrum: the leading singular values of B A, means over the layers.  B_angles, A_angles: the largest principal
    angle to the gradient's leading singular vectors, in degrees, mean over the layers.
    """
    layers = list(lines[-1]["layers"].values()) if lines else []
    spectra = [layer["BA_singular"] for layer in layers if layer.get("BA_singular")]
    found: dict[str, Any] = {}
    if spectra:
        found["spectrum"] = [mean(values) for values in zip(*spectra, strict=False)]
    for name in ("B_angles", "A_angles"):
        largest = [layer[name][-1] for layer in layers if layer.get(name)]
        if largest:
            found[name] = mean(largest)
    return found
