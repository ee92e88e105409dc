"""Where a model is: the hub, a local folder, or one of the bundled models."""

from pathlib import Path
from typing import Any

from lora_one.errors import UsageError

BUNDLED = Path(__file__).parents[1] / "assets"


def local_folder(name: str) -> Path | None:
    """The folder that a model name stands for on this machine, or None for a hub id.

    Raises UsageError: the name looks like a path and there is no such folder, or it holds no config.json; it is a file.
    """
    path = BUNDLED / name.removeprefix("bundled/") if name.startswith("bundled/") else Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UsageError(
                f"model.name={name}: the folder {path} holds no config.json; give a Hugging Face model folder"
            )
        return path
    if path.is_file() or name.lower().endswith(".gguf"):
        raise UsageError(
            f"model.name={name}: a file, such as a GGUF, is not trained; give a Hugging Face model folder (a GGUF "
            "becomes one by from_pretrained(<folder>, gguf_file=<file>), then save_pretrained, of transformers)"
        )
    looks_local = name.startswith(("/", ".", "~", "bundled/")) or name.count("/") > 1
    if looks_local:
        known = ", ".join(f"bundled/{folder.name}" for folder in sorted(BUNDLED.iterdir()))
        raise UsageError(f"model.name={name}: no such folder; give a hub id, a folder, or {known}")
    return None


def check_weights(name: str) -> None:
    """Raises UsageError: the name is that of a local folder that holds no weights."""
    folder = local_folder(name)
    if folder and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise UsageError(
            f"model.name={name}: the folder {folder} holds a config.json and no weights (model.safetensors): fetch "
            "them, or give another model folder"
        )


def source_of(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    folder = local_folder(name)
    return (str(folder.resolve()), {}) if folder else (name, {"revision": revision})
