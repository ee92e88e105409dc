"""Hydra's errors about a command line, as one line each: the value, the rule and the nearest valid names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields

from lora_one.config import first_line, known_keys, unknown_key, valid_keys
from lora_one.config.methods import METHODS
from lora_one.config.optimizers import OPTIMIZERS
from lora_one.errors import nearest
from lora_one.runs.overrides import GROUPS

READERS: Mapping[str, Mapping[str, type]] = {"init": METHODS, "optimizer": OPTIMIZERS}  # choice -> its settings


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """Return Hydra's error about these arguments in one line: the value, the rule, the nearest valid names."""
    from hydra.errors import OverrideParseException

    text = str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be parsed ({first_line(error)}): write key=value, for example model.epochs=1, "
            "and put a value with special characters in quotes"
        )
    if text.startswith("Config group override must be"):
        choices = [argument for argument in arguments if argument.partition("=")[0].lstrip("+") in ("", *GROUPS)]
        return (
            f"{' '.join(choices)}: the value of a group is the name of a file in conf/<group>/; groups: "
            f"{', '.join(GROUPS)}"
        )
    if "interpolation '${results_dir}'" in text:
        return "results_dir=null is not a folder: set results_dir=<a writable folder>"
    if missing := re.search(r"Could not find '([\w/]+)/([^'/]*)'", text):
        group, choice = missing.groups()
        options = re.findall(r"^\t(\S+)$", text.split("Config search path")[0], flags=re.MULTILINE)
        options = [option for option in options if not option.startswith("_")]  # _base is included by the others
        return f"{group}={choice} is not a choice of conf/{group}; {nearest(choice, options)}"
    if key := re.search(r"Could not override '([^']+)'", text):
        section, _, name = key[1].partition(".")
        if section in GROUPS and name in valid_keys(section):
            kinds = READERS.get(section, {}).items()
            readers = ", ".join(choice for choice, kind in kinds if name in {field.name for field in fields(kind)})
            named = f" ({readers})" if readers else ""
            rule = f"only another choice of {section}= reads it{named}"
            return f"unknown key {key[1]}: {rule}; drop it, or change {section}="
        if key[1].startswith("hydra.launcher."):
            return (
                f"unknown key {key[1]}: conf/hydra/launcher/slurm.yaml lists the valid keys; set other options of "
                "sbatch with hydra.launcher.additional_parameters={option: value}"
            )
        return str(unknown_key(key[1], valid_keys(section if name else ""), known_keys()))
    text = re.sub(r"\s*See https://\S+ for details", "", text)
    return " ".join(text.split())
