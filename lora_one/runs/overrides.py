"""Arguments of run_exp.py: translate published spellings and their order for Hydra."""

import re
from collections.abc import Sequence
from pathlib import Path

GROUPS = ("dataset", "model", "peft", "init", "optimizer", "wandb", "experiment")
WITH_VALUE = {"--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--cfg", "-c"}
WITH_VALUE |= {"--experimental-rerun"}  # flags of Hydra; the word after each belongs to it
RENAMED = {"dataset_name": "dataset", "init.weight": "init.scale", "hardware": "plan.hardware"}


def translate(arguments: Sequence[str]) -> list[str]:
    """Translate published spellings to Hydra's, ``+init=x`` to ``init=x``, and put the flags before the overrides.

    Hydra refuses ``+group=`` for a group of the defaults list, accepts ``++dataset_name=`` without any effect, and
    refuses overrides on both sides of a flag.

    >>> translate(["+init=gradient", "++dataset_name=gsm8k,meta_math", "-m", "++init.weight=stable", "++seed=9"])
    ['-m', 'init=gradient', 'dataset=gsm8k,meta_math', 'init.scale=stable', '++seed=9']
    """
    flags, overrides = [], []
    words = iter(arguments)
    for argument in words:
        if argument in WITH_VALUE:
            flags += [argument, *[word for word in [next(words, None)] if word is not None]]
            continue
        match = re.fullmatch(r"(\+{0,2})([\w.]+)=(.*)", argument, flags=re.DOTALL)
        if match:
            key = RENAMED.get(match[2], match[2])
            if key == "results_dir":  # Hydra creates it, and does not know ~
                argument = f"{match[1]}{key}={re.sub(r'(?<![^,])~(?=/)', str(Path.home()), match[3])}"
            if key != match[2] or key in GROUPS:
                argument = f"{key}={match[3]}"
        if is_override(argument):
            overrides.append(argument)
        else:  # a bare --info would take the first override as its value
            flags.append("--info=all" if argument in ("-i", "--info") else argument)
    return flags + overrides


def is_override(argument: str) -> bool:
    """Return whether an argument is an override (key=value, ~key), and not a flag or the value of a flag."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def sets(overrides: Sequence[str], key: str) -> bool:
    """Return whether one of the overrides gives the key a value.

    >>> sets(["++model.epochs=2"], "model.epochs"), sets(["model=tiny"], "model.epochs")
    (True, False)
    """
    return any(override.lstrip("+").partition("=")[0] == key for override in overrides)
