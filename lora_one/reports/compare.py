"""The table of a comparison: choose each method's best grid point, build its row, write CSV."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import inf, isfinite, sqrt
from statistics import mean, stdev
from typing import Any

from lora_one.reports.table import spread
from lora_one.statistics.units import Unit

Grid = Mapping[str, Sequence[Any]]  # key of the configuration -> values tried: numbers, texts, booleans, null or lists
Point = dict[str, Any]  # one value for each key
RATE = "model.learning_rate"

# Figure -> stage of the runs that it is taken from. The seconds are those of the untrained runs, which are the last
# runs of a method, so they do not include the time of first imports; with init.cache, those of the first run
FIGURES = {"validation_loss": "final", "init_loss": "start", "final_loss": "final", "init_seconds": "start"}


@dataclass(frozen=True)
class Run:
    """One run of a comparison: its settings, its folder and its measurements.

    stage: ``tuning`` (a point of the grid), ``final`` (the chosen point) or ``start`` (the chosen point, untrained).
    error: why there is no result; None: there is one. Losses in nats.
    """

    method: str
    stage: str
    point: Point
    seed: int
    path: str | None
    error: str | None = None
    validation_loss: float | None = None
    test_loss: float | None = None
    init_seconds: float | None = None
    train_seconds: float | None = None
    steps: int | None = None
    tokens: int | None = None
    trainable_parameters: int | None = None
    git_commit: str | None = None
    warnings: tuple[str, ...] = ()  # of its start
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)  # evaluation -> value, metric, predictions
    epoch_scores: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # evaluation -> epoch before the end -> value
    peak_memory_bytes: int | None = None
    history: tuple[dict[str, Any], ...] = ()  # of its validations, these and the next three: see measurements
    start: dict[str, float] = field(default_factory=dict)
    adapters: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)


def grid_points(grid: Grid) -> list[Point]:
    """Return every combination of the values; the values of the last key change fastest.

    >>> grid_points({"a": [1, 2], "b": [3, 4]})
    [{'a': 1, 'b': 3}, {'a': 1, 'b': 4}, {'a': 2, 'b': 3}, {'a': 2, 'b': 4}]
    """
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def choose(points: Sequence[Point], tuning: Sequence[Run]) -> Point | None:
    """Return the point with the lowest validation loss (mean over the tuning seeds), the first of equal ones.

    A point with a failed run, or with a loss that is not finite, is not chosen; None: no point is left.
    """

    def loss(point: Point) -> float:
        losses = [run.validation_loss for run in tuning if run.point == point]
        return mean(losses) if losses and all(value is not None and isfinite(value) for value in losses) else inf

    best = min(points, key=loss)
    return best if loss(best) < inf else None


def further_points(points: Sequence[Point], best: Point) -> list[Point]:
    """Return two more learning rates to try, with the other values of the best point.

    If the best rate is the lowest or highest one tried, they are the next two beyond it, at the distance of its
    neighbour; otherwise they are the geometric means with its neighbours, which halves the logarithmic step.

    Two beyond an end, not one beyond and one inside, because a method's best rate may be far from the grid. In a trial
    with a loss that is a parabola in the log of the rate plus a cubic rise above it, 2 rounds and 3 or 4 rates, one of
    each left 12 to 14 times the excess loss for minima up to four steps beyond the grid; for those up to one step
    beyond it was 0.8 times, and inside the grid 0.4 to 0.5 times.

    >>> tried = [{RATE: 1e-3}, {RATE: 1e-2}, {RATE: 1e-1}]
    >>> [[point[RATE] for point in further_points(tried, {RATE: best})] for best in (1e-1, 1e-2)]
    [[1.0, 10.0], [0.00316, 0.0316]]
    """
    rest = {key: value for key, value in best.items() if key != RATE}
    rates = rates_beside(points, best)
    place = rates.index(best[RATE])
    if at_an_end(points, best):
        step = best[RATE] / rates[1 if place == 0 else -2]
        new = [best[RATE] * step, best[RATE] * step**2]
    else:
        new = [sqrt(best[RATE] * rates[place + side]) for side in (-1, 1)]
    rounded = [float(f"{rate:.3g}") for rate in new]
    return [{RATE: rate} | rest for rate in rounded if rate not in rates]


def rates_beside(points: Sequence[Point], best: Point) -> list[float]:
    """Return the learning rates, sorted, that were tried with the other values of the best point."""
    return sorted(point[RATE] for point in points if {**point, RATE: best[RATE]} == best)


def at_an_end(points: Sequence[Point], best: Point) -> bool:
    """Return whether the best learning rate is the lowest or highest one tried.

    >>> [at_an_end([{RATE: 1e-3}, {RATE: 1e-2}, {RATE: 1e-1}], {RATE: rate}) for rate in (1e-3, 1e-2, 1e-1)]
    [True, False, True]
    """
    rates = rates_beside(points, best)
    return best[RATE] in (rates[0], rates[-1])


def edges(chosen: Point, points: Sequence[Point]) -> dict[str, str]:
    """Return the keys whose value is the lowest or highest number tried, so that a better value may lie beyond it.

    >>> edges({"a": 1, "b": 2, "c": 5}, grid_points({"a": [1, 2, 3], "b": [1, 2, 3], "c": [5]}))
    {'a': 'lowest', 'c': 'only'}
    """
    found = {}
    for key, value in chosen.items():
        tried = [point[key] for point in points]
        if all(other == value for other in tried):
            found[key] = "only"
        elif all(is_number(other) for other in tried) and value in (min(tried), max(tried)):
            found[key] = "lowest" if value == min(tried) else "highest"
    return found


def is_number(value: Any) -> bool:
    """Return whether a value of a grid is a number; True and False are not."""
    return type(value) in (int, float)


def value_text(value: Any) -> str:
    """Return a value of a grid as it is written in an override.

    >>> [value_text(value) for value in (0.003, "adamw", True, None, [1, "q_proj"])]
    ['0.003', 'adamw', 'true', 'null', '[1,q_proj]']
    """
    if is_number(value):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    return {True: "true", False: "false", None: "null"}.get(value, str(value))


def method_row(
    method: str,
    runs: Sequence[Run],
    chosen: Point | None,
    points: Sequence[Point],
    pretrained: float,
    evaluations: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the row of a method from all its runs: mean and sample standard deviation (n - 1) of finished runs.

    points: those that were tried.  pretrained: the test loss without an adapter.  evaluations: their names.
    """
    final = [run for run in runs if run.stage == "final" and run.error is None]
    failed = [run for run in runs if run.error is not None]
    ends = edges(chosen, points) if chosen else {}
    row: dict[str, Any] = {"method": method, **dict.fromkeys(points[0]), **(chosen or {})}
    row |= {
        "edge": " ".join(f"{key}={place}" for key, place in ends.items()),
        "grid_points": len(points),
        "seeds": len(final),
        "trainable_parameters": final[0].trainable_parameters if final else None,
        "pretrained_loss": pretrained,
    }
    for name, values in (figures(runs) | evaluation_figures(runs, evaluations)).items():
        row |= {f"{name}_mean": mean(values) if values else None}
        row |= {f"{name}_sd": stdev(values) if len(values) > 1 else None}
    row["failed_runs"] = len(failed)
    reasons = list(dict.fromkeys(run.error for run in failed))
    shown = "; ".join(reasons[:2]) + "; and others" * (len(reasons) > 2)
    notes = [f"without a result, {len(failed)} of {len(runs)} runs: {shown}"] if failed else []
    row["note"] = "; ".join([*notes, *warnings_of(final), *failed_evaluations(final, evaluations)])
    return row


def warnings_of(runs: Sequence[Run]) -> list[str]:
    """Return a note on each kind of warning: its seeds and the first text. Two of one kind differ in numbers alone."""
    kinds: dict[str, list[str]] = {}
    for text in (text for run in runs for text in run.warnings):
        kinds.setdefault(re.sub(r"\d[\d.e+-]*", "", text), []).append(text)
    return [f"warning at the start, {len(texts)} of {len(runs)} seeds: {texts[0]}" for texts in kinds.values()]


def failed_evaluations(runs: Sequence[Run], evaluations: Sequence[str]) -> list[str]:
    """Return a note on each evaluation that failed for some runs."""
    notes = []
    for name in evaluations:
        errors = [run.scores[name]["error"] for run in runs if "error" in run.scores.get(name, {})]
        if errors:
            notes.append(f"evaluation {name} failed, {len(errors)} of {len(runs)} seeds: {errors[0]}")
    return notes


def figures(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Return figure -> its values, one for each finished run of its stage."""
    field = {"init_loss": "test_loss", "final_loss": "test_loss"}
    found = {}
    for name, stage in FIGURES.items():
        values = [getattr(run, field.get(name, name)) for run in runs if run.stage == stage and run.error is None]
        found[name] = [value for value in values if value is not None]
    return found


def evaluation_figures(runs: Sequence[Run], evaluations: Sequence[str]) -> dict[str, list[float]]:
    """Return the scores of each evaluation, as ``<name> after init`` and ``<name>``."""
    stages = {"start": " after init", "final": ""}
    return {
        f"{name}{title}": [
            run.scores[name]["value"] for run in runs if run.stage == stage and "value" in run.scores.get(name, {})
        ]
        for name in evaluations
        for stage, title in stages.items()
    }


def absent_row(method: str, reason: str) -> dict[str, Any]:
    """Return the row of a method that is part of the comparison but cannot run on this machine."""
    return {"method": method, "note": f"not run yet: {reason}"}


def uneven(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for each seed whose final runs differ in steps or tokens; [] if there is none."""
    found = []
    for seed in sorted({run.seed for run in runs}):
        amounts: dict[tuple[int | None, int | None], list[str]] = {}
        for run in runs:
            if run.stage == "final" and run.error is None and run.seed == seed:
                amounts.setdefault((run.steps, run.tokens), []).append(run.method)
        if len(amounts) > 1:
            shares = [f"{steps} steps, {tokens} tokens: {', '.join(m)}" for (steps, tokens), m in amounts.items()]
            found.append(f"Not the same training at seed {seed}: {'; '.join(shares)}.")
    return found


def cell(value: float | None) -> str:
    return "-" if value is None else spread([value]) if isinstance(value, float) else str(value)


def chosen_cell(value: Any, end: str | None, *, known: bool) -> str:
    """Return a chosen value, which may be null, with its place in those tried; known: whether the method has one."""
    return "-" if value is None and not known else value_text(value) + (f" ({end})" if end else "")


def unit_cell(average: float | None, deviation: float | None, unit: Unit) -> str:
    if average is None:
        return "-"
    return unit.number(average) + ("" if deviation is None else f" +- {unit.number(deviation)}")


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a CSV table with one column per figure; missing figures are empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
