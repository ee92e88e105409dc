"""Units of metrics: how values and differences are printed, and whether more is better."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

ZERO = 1e-9  # differences up to here are rounding


@dataclass(frozen=True)
class Unit:
    """How a metric is printed.

    name: of a difference.  value_name: of a value.  scale: factor before printing.  digits: after the point.
    higher: whether more is better.  bounds: of the values, before the factor; None: there are none, or not known.

    >>> POINTS.text(0.0123), NATS.text(-0.5), NATS.text(-2e-5), POINTS.text(-1e-12)
    ('+1.2 points', '-0.5000 nats', '-2e-05 nats', '+0.0 points')
    """

    name: str
    value_name: str
    scale: float
    digits: int
    higher: bool
    bounds: tuple[float, float] | None = field(default=None, compare=False)  # records of earlier versions have none

    def text(self, value: float, sign: str = "+") -> str:
        """Return a difference with its unit; sign: "" prints no plus sign. Only what is 0 is printed as 0."""
        printed = round(value * self.scale, self.digits)
        if printed == 0 and abs(value) > ZERO:
            return f"{value * self.scale:{sign}.1g} {self.name}"
        return f"{printed + 0.0:{sign}.{self.digits}f} {self.name}"  # + 0.0: no "-0.0"

    def largest_difference(self, value: float) -> float:
        """Return the largest difference, in either direction, that another value can have to this one.

        >>> POINTS.largest_difference(0.8), NATS.largest_difference(0.8)
        (0.8, inf)
        """
        return inf if self.bounds is None else max(value - self.bounds[0], self.bounds[1] - value)

    def number(self, value: float) -> str:
        """Return a value without its unit."""
        return f"{value * self.scale:.{self.digits}f}"


# shares of correct answers; their differences in percentage points
POINTS = Unit("points", "%", 100, 1, higher=True, bounds=(0.0, 1.0))
CORRELATION = replace(POINTS, bounds=(-1.0, 1.0))  # printed like a share
NATS = Unit("nats", "nats", 1, 4, higher=False)  # losses
BITS = Unit("bits per byte", "bits per byte", 1, 4, higher=False)


def unit_in(report: Mapping[str, Any], metric: str) -> Unit:
    """Return the unit of a metric of an evaluation. report: the content of its metrics.json.

    A benchmark writes the units of its metrics to ``units``. Without an entry, a metric called loss is in nats, and
    every other one is a share.
    """
    given = report.get("units", {}).get(metric)
    if given is not None:
        return Unit(**given)
    return NATS if metric == "loss" else POINTS
