"""The unit of a metric: written by its benchmark, otherwise that of a share, or of a loss."""

import doctest
from dataclasses import asdict

from lora_one.statistics import units
from lora_one.statistics.units import BITS, NATS, POINTS, unit_in


def test_a_report_says_the_unit_of_its_metrics():
    report = {"metrics": {"a": 1.0, "loss": 2.0, "accuracy": 0.5}, "units": {"a": asdict(BITS)}}
    assert [unit_in(report, name) for name in ("a", "loss", "accuracy")] == [BITS, NATS, POINTS]
    assert unit_in({"units": {"loss": asdict(POINTS)}}, "loss") == POINTS


def test_values_and_differences():
    assert (POINTS.number(0.7034), POINTS.text(-0.0134)) == ("70.3", "-1.3 points")
    assert (NATS.number(2.5), BITS.text(0.25)) == ("2.5000", "+0.2500 bits per byte")
    assert POINTS.higher and not NATS.higher and not BITS.higher


def test_doctests():
    assert doctest.testmod(units).failed == 0
