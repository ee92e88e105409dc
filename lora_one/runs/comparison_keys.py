"""Which keys of a comparison file apply: those of the file with those of a task, and those of a small trial."""

from collections.abc import Collection
from typing import Any

from lora_one.config import unknown_key
from lora_one.errors import UsageError

EXAMPLE = "{common: [model.name=<small model>, dataset.path=<file>], seeds: [1], grid: {model.learning_rate: [1e-3]}}"


def joined(file: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of the file with those of a task: ``common`` after the file's, mappings merged, others replaced.

    Within ``small`` the same holds.

    >>> joined({"common": ["a=1"], "small": {"common": ["a=2"]}}, {"common": ["b=1"], "small": {"common": ["b=2"]}})
    {'common': ['a=1', 'b=1'], 'small': {'common': ['a=2', 'b=2']}}
    """
    given = file | task
    for key, value in task.items():
        if key == "common" and isinstance(value, list) and isinstance(file.get(key), list):
            given[key] = [*file[key], *value]
        elif isinstance(value, dict) and isinstance(file.get(key), dict):
            given[key] = joined(file[key], value) if key == "small" else file[key] | value
    return given


def small_trial(given: dict[str, Any], changes: Any, known: Collection[str]) -> dict[str, Any]:
    """Return the keys of a comparison with those of ``small`` in their places; ``common`` comes after the given one.

    A grid replaces those of all methods; published values of evaluations that are left out are left out, too.
    given: valid keys.  changes: the value of ``small``.  known: the names of the keys.
    Raises UsageError: ``small`` is not a mapping, or it has an unknown key.
    """
    if not isinstance(changes, dict):
        raise UsageError(f"small={changes!r} must be a mapping of keys of the file, for example {EXAMPLE}")
    for key in changes:
        if key not in known:
            raise unknown_key(f"small.{key}", known)
    dropped = {"seconds_per_run"} | ({"own_grid"} if "grid" in changes else set())
    made = {key: value for key, value in given.items() if key not in dropped} | changes
    made["title"] = f"{made['title']} (small)"
    if isinstance(changes.get("common"), list):
        made["common"] = [*given["common"], *changes["common"]]
    if made.get("published"):
        values, asked = made["published"]["values"], made.get("evaluations") or {}
        made["published"] = made["published"] | {"values": {name: values[name] for name in values if name in asked}}
    return made
