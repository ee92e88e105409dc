"""Which methods a report shows: all of them, or the best ones of a large sweep."""

from collections.abc import Sequence
from math import inf
from statistics import fmean

from lora_one.reports.compare import Run
from lora_one.reports.findings import LOSS, VALIDATION, by_seed, unit_of

SHOWN = 21  # at most; so many look different in the figures, and a table of them can be read


def main_figure(runs: Sequence[Run], evaluations: Sequence[str]) -> str:
    """Return the first evaluation that was measured, else the test loss, else the validation loss."""
    measured = (name for name in (*evaluations, LOSS, VALIDATION) if by_seed(runs, name))
    return next(measured, LOSS)


def shown_methods(runs: Sequence[Run], methods: Sequence[str], figure: str, baseline: str | None) -> list[str]:
    """Return the SHOWN methods with the best means of a figure over the seeds, in the given order.

    The baseline is always one of them. Methods without a value come last.
    """
    if len(methods) <= SHOWN:
        return list(methods)
    sign = -1 if unit_of(runs, figure).higher else 1
    means = {method: sign * fmean(values.values()) for method, values in by_seed(runs, figure).items()}
    ranked = sorted(methods, key=lambda method: (method != baseline, means.get(method, inf)))
    best = set(ranked[:SHOWN])
    return [method for method in methods if method in best]
