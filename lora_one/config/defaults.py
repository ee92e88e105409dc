"""The default settings of a method of ``init``, read from conf/ without Hydra, for callers of the library."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lora_one.config.methods import METHODS


def configuration_folder() -> Path:
    """Return the folder of the configuration files: conf/ of a checkout, or lora_one/conf/ of an installed package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def defaults_of(choice: str) -> dict[str, Any]:
    """Return the keys of conf/init/<choice>.yaml and of the files that it is based on."""
    given = OmegaConf.to_container(OmegaConf.load(configuration_folder() / "init" / f"{choice}.yaml"))
    keys: dict[str, Any] = {}
    for name in given.pop("defaults", ["_self_"]):
        keys |= given if name == "_self_" else defaults_of(name)
    return keys


def choices_of_init() -> dict[str, str]:
    """Return the public names of the methods with their file in conf/init/: ``lora_one`` and ``LoRA-One``, for example.

    The files in the published spelling (``mode``) are left out, because each of their methods has a file of its own.
    """
    files = sorted((configuration_folder() / "init").glob("[!_]*.yaml"))
    choices = {file.stem: file.stem for file in files if "method" in defaults_of(file.stem)}
    return choices | {kind.title: name for name, kind in METHODS.items()}
