"""Units of metrics: how values and differences are printed, and whether more is better."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unit:
    """How a metric is printed.

    name: of a difference.  value_name: of a value.  scale: factor before printing.  digits: after the point.
    higher: whether more is better.

    >>> POINTS.text(0.0123), NATS.text(-0.5), POINTS.text(-1e-6)
    ('+1.2 points', '-0.5000 nats', '+0.0 points')
    """

    name: str
    value_name: str
    scale: float
    digits: int
    higher: bool

    def text(self, value: float, sign: str = "+") -> str:
        """Return a difference with its unit; sign: "" prints no plus sign."""
        return f"{round(value * self.scale, self.digits) + 0.0:{sign}.{self.digits}f} {self.name}"  # + 0.0: no "-0.0"

    def number(self, value: float) -> str:
        """Return a value without its unit."""
        return f"{value * self.scale:.{self.digits}f}"


POINTS = Unit("points", "%", 100, 1, higher=True)  # shares of correct answers; their differences in percentage points
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
