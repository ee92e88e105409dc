"""The default settings of a method of ``init`` or of a data set, read from conf/ without Hydra."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lora_one.config import converted
from lora_one.config.methods import METHODS
from lora_one.datasets import DATASETS
from lora_one.datasets.settings import DatasetConfig


def configuration_folder() -> Path:
    """Return the folder of the configuration files: conf/ of a checkout, or lora_one/conf/ of an installed package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def defaults_of(choice: str, group: str = "init") -> dict[str, Any]:
    """Return the keys of conf/<group>/<choice>.yaml and of the files of its group that it is based on."""
    given = OmegaConf.to_container(OmegaConf.load(configuration_folder() / group / f"{choice}.yaml"))
    keys: dict[str, Any] = {}
    for name in given.pop("defaults", ["_self_"]):
        if isinstance(name, str):  # otherwise a choice of another group
            keys |= given if name == "_self_" else defaults_of(name, group)
    return keys


def dataset_settings(name: str, path: str | None) -> DatasetConfig:
    """Return the default settings of a data set. path: local file or folder; None: the hub."""
    given = defaults_of(name, "dataset") | {"path": path}
    return converted("dataset.", given, DATASETS[name].settings)


def choices_of_init() -> dict[str, str]:
    """Return the public names of the methods with their file in conf/init/: ``lora_one`` and ``LoRA-One``, for example.

    Left out are files in the published spelling (``mode``), because each of their methods has a file of its own, and
    methods that change the weights themselves.
    """
    files = sorted((configuration_folder() / "init").glob("[!_]*.yaml"))
    of_adapters = {name: kind for name, kind in METHODS.items() if not kind.steps_weights}
    choices = {file.stem: file.stem for file in files if defaults_of(file.stem).get("method") in of_adapters}
    return choices | {kind.title: name for name, kind in of_adapters.items()}
