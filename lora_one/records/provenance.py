"""Provenance of a result: versions, commit, fingerprints of local models and data, and the configuration's hash."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_one.datasets import DATASETS
from lora_one.datasets.questions import EVALUATIONS, evaluations_in
from lora_one.files import fingerprint

PACKAGES = (
    "lora-one",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "hydra-core",
    "omegaconf",
    "wandb",
    "bitsandbytes",
)

# keys that cannot change the adapter, such as names, folders and logging
NOT_HASHED = {"seed", "results_dir", "overwrite", "dry_run", "process_timeout_s", "plan.processes", "plan.hardware"}
NOT_HASHED |= {
    f"model.{key}" for key in ("saving", "logging_steps", "keep_epochs", "save_steps", "preflight", "sharded")
}
NOT_HASHED |= {f"init.{key}" for key in ("cache", "memory")}
NOT_HASHED |= {"dataset.accuracy_examples", "dataset.max_new_tokens", "dataset.answer", "dataset.cache"}
# Newer keys and the value that changes nothing: with it, the hash is that of runs from before the key existed
ADDED = {"dataset.train_on_inputs": False, "dataset.rows": None, "init.shuffle": None}


@cache
def source_fingerprint() -> str:
    """Return the sha256 of the source files of this package."""
    total = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        total.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return total.hexdigest()


def local_fingerprints(config: dict[str, Any], model_folder: Path | None) -> dict[str, str]:
    """Return the fingerprints of the model and the data that are local, by configuration key."""
    found = {}
    if model_folder is not None:
        found["model.name"] = fingerprint(model_folder)
    data = config["dataset"].get("path")
    if data is not None:
        nested = DATASETS[config["dataset"]["name"]].nested
        found["dataset.path"] = fingerprint(Path(data).expanduser(), nested=nested)
    evaluations = evaluations_in(config["dataset"].get("decontaminate"))
    if evaluations:
        found["dataset.decontaminate"] = " ".join(
            name if name in EVALUATIONS else fingerprint(Path(name).expanduser(), nested=True) for name in evaluations
        )
    return found


def config_hash(config: dict[str, Any], fingerprints: dict[str, str]) -> str:
    """Return the sha256 (hex) of everything that can change the adapter; a fingerprint replaces a local path."""
    hashed = {}
    for section, value in config.items():
        entries = {f"{section}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {section: value}
        if section != "wandb":
            entries = {key: item for key, item in entries.items() if key not in ADDED or item != ADDED[key]}
            hashed |= {key: fingerprints.get(key, item) for key, item in entries.items() if key not in NOT_HASHED}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def git_commit() -> str | None:
    """Return the commit of this source tree, with "+changes" if files were changed since; None without a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance(
    fingerprints: dict[str, str], model_folder: Path | None = None, model_commit: str | None = None
) -> dict[str, Any]:
    """Return the entry ``provenance`` of run.json. model_commit: of a hub model."""
    return {
        "versions": versions(),
        "git_commit": git_commit(),
        "fingerprints": fingerprints,
        "model_folder": str(model_folder.resolve()) if model_folder else None,
        "model_commit": model_commit,
        "code": source_fingerprint(),
        "machine": machine(),
    }


def machine() -> str:
    """Describe the machine: CPU and number of cores; where torch is used, also its threads and the models' device."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    if "torch" not in sys.modules:  # as in an evaluation on a server
        return f"{cpu}, {os.cpu_count()} cores"
    import torch

    from lora_one.models import device

    return f"{cpu}, {torch.get_num_threads()} of {os.cpu_count()} cores, on {device()}"
