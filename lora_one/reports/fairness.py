"""What a comparison holds equal, checked run by run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_one.reports.compare import Run

NOT_SHARED = {"configuration", "versions", "method"}  # of a run's identity: differ between methods, or shown apart
SHOWN = 12  # characters of a hash


def fairness(runs: Sequence[Run], comparison: Mapping[str, Any]) -> list[list[str]]:
    """Return a table: what was checked, the value, and where it differs. comparison: its file as read.

    Steps and tokens are compared among the final runs of one seed, because the order of the examples depends on it.
    """
    done = [run for run in runs if run.error is None and run.stage != "start"]  # those without training have no epochs
    final = [run for run in done if run.stage == "final"]
    lines = [["checked", "value", "in all runs"]]
    names = dict.fromkeys(name for run in done for name in run.identity if name not in NOT_SHARED)
    for name in names:
        lines.append([name, *compared([run.identity.get(name) for run in done])])
    lines.append(["package versions", *compared([run.identity.get("versions") for run in done])])
    lines.append(["commit", *compared([run.git_commit for run in done])])
    if lines[-1][-1] == "yes" and (lines[-1][1] == "None" or lines[-1][1].endswith("+changes")):
        lines[-1][-1] = "not known"  # what was changed is not part of a commit; see code
    for name in ("steps", "tokens"):
        lines.append([name, *by_seed(final, name)])
    lines += [[f"method of {name}", *compared(active)] for name, active in active_methods(final).items()]
    counts = Counter(run.method for run in runs if run.stage == "tuning" and run.path)  # without: it could not start
    if counts:
        lines.append(["tuning runs", *compared(list(counts.values()))])
        reason = comparison.get("unequal_budgets")
        if reason:
            lines[-1][-1] += f" ({reason})"
    shared = set(comparison.get("tuning_seeds", ())) & set(comparison.get("seeds", ()))
    if comparison.get("tuning_seeds"):
        seeds = "apart" if not shared else f"{', '.join(map(str, sorted(shared)))} tune and are reported"
        reason = comparison.get("shared_seeds")
        apart = "yes" if not shared else f"no ({reason})" if reason else "no"
        lines.append(["tuning and reported seeds", seeds, apart])
    return lines


def active_methods(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return what the runs of each method record as their method; earlier runs recorded nothing."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if "method" in run.identity:
            found.setdefault(run.method, []).append(run.identity["method"])
    return found


def compared(values: Sequence[Any]) -> tuple[str, str]:
    """Return the common value and "yes", or the different values with their numbers and "no"."""
    counts = Counter(map(text_of, values))
    if len(counts) < 2:
        return next(iter(counts), "-"), "yes" if counts else "-"
    return "; ".join(f"{text} ({count} x)" for text, count in counts.items()), "no"


def by_seed(runs: Sequence[Run], name: str) -> tuple[str, str]:
    """Return the values of the seeds, and whether all methods have the same one at each."""
    found: dict[int, set[Any]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        found.setdefault(run.seed, set()).add(getattr(run, name))
    every = sorted({value for values in found.values() for value in values if value is not None})
    if not every:
        return "-", "-"
    text = str(every[0]) if len(every) == 1 else f"{every[0]} to {every[-1]}, by seed"
    differing = [seed for seed, values in found.items() if len(values) > 1]
    return text, "no, seed " + ", ".join(map(str, differing)) if differing else "yes"


def text_of(value: Any) -> str:
    """Return a value as text; a hash is shortened."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    text = str(value)
    is_hash = len(text) >= 40 and not set(text.removesuffix("+changes")) - set("0123456789abcdef")
    return text[:SHOWN] + ("+changes" if text.endswith("+changes") else "") if is_hash else text
