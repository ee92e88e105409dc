"""Read the content of run and evaluation folders, without the entries that differ between equal runs (LEFT_OUT)."""

import csv
import hashlib
import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LEFT_OUT = {
    "run.json": ["config", "provenance", "wandb_id", "seconds", "peak_memory_bytes"],  # seconds: of start and training
    "metrics.jsonl": ["train_runtime", "train_tokens_per_second"],
    "metrics.json": ["task", "model", "settings", "provenance", "seconds"],
    "sweep-<hash>.csv": ["init s", "init s sd", "train s", "train s sd", "hashes in names"],
    "adapter_config.json": ["peft_version", "the order of a list of names"],  # PEFT writes sets
    "config.json": ["transformers_version"],
    "files of which only the name is recorded, without a hash in it": [
        "curves.png",
        "optimizer.pt and other states of a resume point",
    ],
    "nowhere": ["what is printed", "messages of wrong command lines", "sweep-<hash>.md", "tables of compare.py"],
}
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "accelerate", "bitsandbytes", "numpy")


def content_of(folder: Path) -> dict[str, Any]:
    """Return the runs in a folder, sorted by their folders without hashes, and its tables and evaluations."""
    runs = sorted((file.parent for file in folder.rglob("run.json")), key=lambda run: (without_hash(str(run)), run))
    found: dict[str, Any] = {"runs": [content_of_run(run, folder) for run in runs]}
    tables = [list(csv.DictReader(file.open())) for file in sorted(folder.glob("sweep-*.csv"))]
    found["tables"] = [
        [{k: without_hash(v) for k, v in row.items() if k not in LEFT_OUT["sweep-<hash>.csv"]} for row in rows]
        for rows in tables
    ]
    found["evaluations"] = {} if runs else evaluations_in(folder)
    return {name: value for name, value in found.items() if value}


def without_hash(name: str) -> str:
    """Return the path of a run without the hash of its configuration."""
    return re.sub(r"-[0-9a-f]{8}(?=/|$)", "", name)


def name_in(folder: Path, file: Path) -> str:
    """Return the path of a file within a folder, without hashes."""
    return without_hash(file.relative_to(folder).as_posix())


def content_of_run(run: Path, results: Path) -> dict[str, Any]:
    """Return the content of a run's folder: its files, run.json, metrics, tensors and evaluations."""
    record = read(run / "run.json")
    place = {"folder": run.relative_to(results).as_posix(), "config_hash": record.pop("config_hash", None)}
    files = {name_in(run, file): file for file in sorted(run.rglob("*")) if file.is_file()}
    found: dict[str, Any] = {"place": place, "files": list(files)}
    entries = without(record, LEFT_OUT["run.json"])
    found["run.json"] = {key: without(value, ["seconds"]) for key, value in entries.items()}
    for name, file in files.items():
        if file.suffix == ".safetensors":
            found[name] = tensors_in(file)
        elif name in ("metrics.jsonl", "diagnostics.jsonl"):
            lines = map(json.loads, file.read_text().splitlines())
            found[name] = [without(line, LEFT_OUT["metrics.jsonl"]) for line in lines]
        elif file.name in ("adapter_config.json", "config.json"):
            found[name] = {
                key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
                for key, value in without(read(file), LEFT_OUT[file.name]).items()
            }
        elif file.name.startswith(("tokenizer", "generation_config")):
            found[name] = sha256(file.read_bytes())
    return found | {"evaluations": evaluations_in(run)}


def evaluations_in(folder: Path) -> dict[str, Any]:
    """Return the metrics and the completions of all evaluations in a folder."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*.json*")):
        name = name_in(folder, file)
        if file.name == "metrics.json":
            found[name] = without(read(file), LEFT_OUT["metrics.json"])
        elif file.name in ("predictions.jsonl", "samples.jsonl"):
            completions = [json.loads(line)["completion"] for line in file.read_text().splitlines()]
            found[name] = {"sha256": sha256(file.read_bytes()), "completions": completions}
    return found


def tensors_in(file: Path) -> dict[str, str]:
    """Return name -> dtype, shape and sha256 of the bytes of each tensor in a safetensors file."""
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = without(json.loads(content[8:begin]), ["__metadata__"])
    return {
        name: f"{tensor['dtype']} {tensor['shape']} "
        + sha256(content[begin + tensor["data_offsets"][0] : begin + tensor["data_offsets"][1]])
        for name, tensor in sorted(header.items())
    }


def without(values: Any, keys: list[str]) -> Any:
    """Return a dictionary without some keys; other values unchanged."""
    return {key: value for key, value in values.items() if key not in keys} if isinstance(values, dict) else values


def read(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fingerprint(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return sha256("".join(f"{file.relative_to(folder)} {sha256(file.read_bytes())}\n" for file in files).encode())


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
