"""Hydra's errors about a command line, as one line each: the value, the rule and the nearest valid names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields

from lora_one.config import first_line, known_keys, unknown_key, valid_keys
from lora_one.config.methods import METHODS
from lora_one.config.optimizers import OPTIMIZERS
from lora_one.errors import UsageError, nearest
from lora_one.runs.overrides import GROUPS

READERS: Mapping[str, Mapping[str, type]] = {"init": METHODS, "optimizer": OPTIMIZERS}  # choice -> its settings
ELSEWHERE = {  # (group, what users expect there) -> how it is written here
    ("peft", "qlora"): "model.quantization=nf4",
    ("peft", "lora"): "peft=all (every linear layer) or peft=qv, and the initialisation by init=lora",
    ("wandb", "off"): "wandb.mode=disabled",
    **{("wandb", mode): f"wandb.mode={mode}" for mode in ("disabled", "offline", "online")},
}


def refuse_unknown_flags(arguments: Sequence[str]) -> None:
    """Raise UsageError if a word begins with ``--`` and is not a flag of Hydra, such as a setting: ``--dry_run``."""
    from hydra._internal.utils import get_args_parser

    known = {*get_args_parser()._option_string_actions, "--version"}
    for word in arguments:
        name, _, value = word.partition("=")
        if name.startswith("--") and name not in known:
            setting = f"{name.strip('-').replace('-', '_')}={value or '<value>'}"
            raise UsageError(
                f"{word} is not a flag: settings have no dashes, {setting} if it is a key, such as dry_run=true or "
                "model.learning_rate=1e-3; --help lists keys and flags"
            )


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """Return Hydra's error about these arguments in one line: the value, the rule, the nearest valid names."""
    from hydra.errors import OverrideParseException

    text = str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be parsed ({first_line(error)}): write key=value, for example model.epochs=1, "
            "and put a value with spaces, commas, brackets or letters beyond ASCII in quotes inside those of the "
            "shell: \"wandb.name='my run, lr=3'\""
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
        path = next((a for a in arguments if "/" in a and a.partition("=")[0].lstrip("+") in GROUPS), None)
        if path is not None and "//" in text:
            group, _, choice = path.lstrip("+").partition("=")
            own = {
                "model": f"; a model of your own: model.name={choice}",
                "dataset": f"; a file: dataset.path={choice}",
            }
            return f"{path}: the value of a group is the name of a file in conf/{group}/{own.get(group, '')}"
        if own := ELSEWHERE.get((group, choice)):
            return f"{group}={choice} is not a choice of conf/{group}: set {own}"
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
    if text.startswith("Ambiguous value for argument"):
        (argument,) = re.findall(r"argument '(.*)'", text.splitlines()[0])
        key = argument.partition("=")[0]
        return (
            f"{argument} has several values: add -m for a run with each of them; a list is {key}=[value1,value2], and "
            "a text with a comma has quotes inside those of the shell"
        )
    text = re.sub(r"\s*See https://\S+ for details", "", text)
    return " ".join(text.split())
