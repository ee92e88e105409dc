"""Which keys of a comparison file apply: those of the file with those of a task, and those of a small trial."""

from collections.abc import Collection
from math import inf
from typing import Any

from lora_one.config import unknown_key
from lora_one.errors import UsageError
from lora_one.files import folder_name
from lora_one.reports.compare import FIGURES
from lora_one.reports.findings import LOSSES

EXAMPLE = "{common: [model.name=<small model>, dataset.path=<file>], seeds: [11], grid: {model.learning_rate: [1e-3]}}"


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
    made.setdefault("shared_seeds", "a small trial")
    if isinstance(changes.get("common"), list):
        made["common"] = [*given["common"], *changes["common"]]
    if made.get("published"):
        values, asked = made["published"]["values"], made.get("evaluations") or {}
        made["published"] = made["published"] | {"values": {name: values[name] for name in values if name in asked}}
    return made


def check_kinds(given: dict[str, Any]) -> None:
    """Check what the keys of a comparison file are: texts, numbers, mappings. Raises UsageError: one is not."""
    if not isinstance(given["title"], str) or not given["title"].strip():
        raise UsageError(f"title={given['title']!r} must be a text: write it in quotes")
    for key in ("unequal_budgets", "shared_seeds", "overlap"):
        if key in given and (not isinstance(given[key], str) or not given[key].strip()):
            raise UsageError(f"{key}={given[key]!r} must be a text: the reason, which is printed with the results")
    seconds = given.get("seconds_per_run", 1)
    if type(seconds) not in (int, float) or not 0 < seconds < inf:
        raise UsageError(f"seconds_per_run={seconds!r} must be a positive number")
    own = given.get("own_grid", {})
    grids = {f"own_grid.{name}": grid for name, grid in own.items()} if isinstance(own, dict) else {"own_grid": own}
    for key, value in {"grid": given["grid"], "slurm": given.get("slurm", {}), **grids}.items():
        if not isinstance(value, dict):
            raise UsageError(f"{key}={value!r} must be a mapping of keys; leave it out if empty, or write {{}}")


TAKEN = {*LOSSES, *FIGURES}  # names of other columns


def check_names(methods: Any, evaluations: Any, not_run: Any) -> None:
    """Check the names in a comparison file. Raises UsageError: not texts, given twice, or those of other columns."""
    for key, names in (("methods", methods), ("evaluations", evaluations), ("not_run", not_run)):
        if not isinstance(names, dict):
            raise UsageError(
                f"{key}={names!r} must be a mapping, for example {key}: {{<name>: ...}}; leave it out if empty"
            )
        for name in names:
            if not isinstance(name, str):
                raise UsageError(f"{key}: the name {name!r} is not a text: write it in quotes")
            if not name.strip():
                raise UsageError(f"{key}: a name is empty: write <name>: ...")
    for name, reason in not_run.items():
        if not isinstance(reason, str) or not reason.strip():
            raise UsageError(f"not_run.{name}={reason!r} must be a text: the reason")
    both = [name for name in not_run if name in methods]
    if both:
        raise UsageError(f"not_run.{both[0]} is also one of the methods: leave one of them out")
    for name in evaluations:
        if name in TAKEN or (name.removesuffix(" after init") in evaluations and name.endswith(" after init")):
            raise UsageError(f"evaluations.{name}: this is the name of another column: choose another name")


def check_tasks(tasks: dict[Any, Any]) -> None:
    """Check the names of tasks, which become folders. Raises UsageError: not texts, or two share a folder."""
    folders: dict[str, str] = {}
    for name in tasks:
        if not isinstance(name, str):
            raise UsageError(f"tasks: the name {name!r} is not a text: write it in quotes")
        other = folders.setdefault(folder_name(name), name)
        if other != name or (name and not folder_name(name)):
            raise UsageError(
                f"tasks: {name!r} has the folder {folder_name(name)!r}, like {other!r}: choose another name"
            )
