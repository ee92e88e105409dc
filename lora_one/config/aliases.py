"""Translate the published spelling of ``init`` (mode, direction, all keys in one file) to a method's settings and back.

A run's hash is computed from the published spelling, so both spellings, and runs of earlier versions, share one folder.
"""

import dataclasses
from typing import Any

from lora_one.config.methods import METHODS, MethodSettings
from lora_one.errors import UsageError, nearest

DIRECTIONS = {"LoRA-One": "lora_one", "LoRA-GA": "lora_ga", "LoRA-SB": "lora_sb"}  # of mode=gradient
MODES = {"simple": "lora", "svd": "svd", "lora_xs": "lora_xs", "loftq": "loftq"}  # mode -> method
PEFT = ("corda", "eva", "lora_ga_peft", "olora", "pissa")  # of mode=peft
PUBLISHED_KEYS = {"mode", "direction"}
# Keys of mode=gradient that only some directions read -> their values that mean "not set", the default first.
OPTIONAL: dict[str, tuple[Any, ...]] = {
    "scale": ("stable", None),
    "stable_gamma": (None,),
    "search_examples": (None,),
    "normalize": ("s0",),
    "shuffle": (None,),
    "ga_direction": ("ArB2r",),
    "eta": (None,),
}


def translated(given: dict[str, Any]) -> dict[str, Any]:
    """Return the section ``init`` with ``method`` instead of ``mode`` and ``direction``, and only the method's keys.

    Raises UsageError: an unknown name, or a value for a key that the method does not read.
    """
    if "mode" not in given:
        return given
    rest = {key: value for key, value in given.items() if key != "mode"}
    mode = given["mode"]
    if "method" in rest and mode != "peft":
        raise UsageError(f"unknown key init.method: init.mode={mode} does not use it; remove it")
    if mode == "gradient":
        return of_direction(rest)
    if mode in MODES:
        return {"method": MODES[mode]} | rest
    if mode != "peft":
        known = {"gradient", "peft", *MODES}
        raise UsageError(f"init.mode={mode} is not a choice; {nearest(mode, known)}")
    if rest.get("method") not in PEFT:
        method = rest.get("method")
        raise UsageError(f"init.method={method} is not an initialisation by PEFT; {nearest(method, PEFT)}")
    return rest


def of_direction(given: dict[str, Any]) -> dict[str, Any]:
    """Translate the keys of mode=gradient, without those that the direction does not read.

    Raises UsageError: an unknown direction, or a key is set that the direction does not read.
    """
    direction = given.get("direction")
    if str(direction) not in DIRECTIONS:
        raise UsageError(f"init.direction={direction} is not a choice; {nearest(direction, DIRECTIONS)}")
    method = DIRECTIONS[direction]
    read = keys_of(METHODS[method])
    kept: dict[str, Any] = {"method": method}
    for key, value in given.items():
        if key == "direction":
            continue
        if key in read or key not in OPTIONAL:
            kept[key] = value
        elif value not in OPTIONAL[key]:
            readers = [title for title, name in DIRECTIONS.items() if key in keys_of(METHODS[name])]
            raise UsageError(
                f"init.{key}={value} is used only by {' and '.join(readers)}, not by {direction}: remove it"
            )
    return kept


def keys_of(schema: type[MethodSettings]) -> set[str]:
    """Return the keys that a method reads."""
    return {field.name for field in dataclasses.fields(schema)}


def published_form(settings: MethodSettings) -> dict[str, Any]:
    """Return the settings in the published spelling; if the method has none, return its settings unchanged."""
    written = dataclasses.asdict(settings)
    for direction, method in DIRECTIONS.items():
        if settings.method == method:
            unset = {key: values[0] for key, values in OPTIONAL.items()}
            return {"mode": "gradient", "direction": direction} | unset | without_method(written)
    for mode, method in MODES.items():
        if settings.method == method:
            return {"mode": mode} | without_method(written)
    return {"mode": "peft"} | written if settings.method in PEFT else written


def without_method(written: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without the key ``method``."""
    return {key: value for key, value in written.items() if key != "method"}
