"""Where a model is: on the hub, in a local folder, or among the bundled models."""

from pathlib import Path
from typing import Any

from lora_one.errors import UsageError

BUNDLED = Path(__file__).parents[1] / "assets"


def local_folder(name: str, key: str = "model.name") -> Path | None:
    """Return the local folder of a model name; None: the name is a hub id. key: what the messages call the name.

    Raises UsageError: the name looks like a path but there is no such folder, the folder has no config.json, or the
    path is a file.
    """
    path = BUNDLED / name.removeprefix("bundled/") if name.startswith("bundled/") else Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UsageError(f"{key}={name}: the folder {path} has no config.json: pass a Hugging Face model folder")
        return path
    if path.is_file() or name.lower().endswith(".gguf"):
        raise UsageError(
            f"{key}={name}: a single file, such as a GGUF file, cannot be loaded: pass a Hugging Face model "
            "folder (transformers converts a GGUF file: from_pretrained(<folder>, gguf_file=<file>), then "
            "save_pretrained)"
        )
    looks_local = name.startswith(("/", ".", "~", "bundled/")) or name.count("/") > 1
    if looks_local:
        known = ", ".join(f"bundled/{folder.name}" for folder in sorted(BUNDLED.iterdir()))
        raise UsageError(f"{key}={name}: there is no such folder: pass an existing folder, a hub id, or {known}")
    return None


def check_weights(name: str, key: str = "model.name") -> None:
    """Raise UsageError if the name is that of a local folder without weights. key: as in ``local_folder``."""
    folder = local_folder(name, key)
    if folder and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise UsageError(
            f"{key}={name}: the folder {folder} has a config.json but no weights (model.safetensors): download "
            "them into it, or pass another model folder (a plan needs no weights: dry_run=true plan.processes=1)"
        )


def commit_of(name: str, revision: str | None) -> str | None:
    """Return the commit of a hub model that has been downloaded; None: a local folder, or it is not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    file = None if local_folder(name) else try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def source_of(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    folder = local_folder(name)
    return (str(folder.resolve()), {}) if folder else (name, {"revision": revision})
