"""The record of a comparison, as the sections of a report read it, and what a section is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from lora_one.reports.compare import Run
from lora_one.reports.figures import Drawing, looks_of
from lora_one.reports.findings import LOSS, VALIDATION, by_seed, unit_of
from lora_one.statistics.units import NATS, Unit
from lora_one.statistics.verdicts import BETTER, WORSE

Table = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a report. table: its first row is the header.

    folded, long_table: the section, or its table, is long, so that a page shows it on request and LaTeX leaves it out.
    """

    title: str
    text: Sequence[str] = ()
    items: Sequence[str] = ()
    table: Table = ()
    drawings: Sequence[Drawing] = ()
    folded: bool = False
    long_table: bool = False


class Results:
    """The record of a comparison, as the sections read it."""

    def __init__(self, record: Mapping[str, Any]):
        self.record = record
        self.runs = [Run(**run) for run in record["runs"]]
        self.evaluations = list(record["comparison"]["evaluations"])
        self.baseline = record["comparison"]["baseline"]
        self.rows = record["rows"]
        self.methods = [row["method"] for row in self.rows]
        self.looks = looks_of(self.methods)
        self.keys = list(dict.fromkeys(key for run in self.runs for key in run.point))
        published = record["comparison"].get("published") or {"source": "", "values": {}}
        self.source, self.published = published["source"], published["values"]

    def of(self, method: str, stage: str) -> list[Run]:
        """Return the finished runs of a method in a stage."""
        return [run for run in self.runs if (run.method, run.stage, run.error) == (method, stage, None)]

    @property
    def figure(self) -> str:
        """Return the main figure: the first evaluation, else the test loss, else the validation loss."""
        measured = [name for name in (*self.evaluations, LOSS, VALIDATION) if by_seed(self.runs, name)]
        return measured[0] if measured else LOSS

    def unit(self, figure: str) -> Unit:
        """Return the unit of a figure."""
        return unit_of(self.runs, figure)

    def titled(self, figure: str) -> str:
        """Return the name of a figure with the unit of its values."""
        return f"{figure} ({self.unit(figure).value_name})"

    def values(self, method: str, figure: str, stage: str = "final") -> list[float]:
        """Return a figure of a method's runs in a stage, one for each seed that has it."""
        return list(by_seed(self.of(method, stage), figure, stage).get(method, {}).values())

    def summary(self, method: str) -> str:
        """Return the main figure of a method, with the verdict if it is better or worse, and the published value."""
        text = spread(self.values(method, self.figure), self.unit(self.figure))
        outcome = self.outcomes.get(method)
        text += f" ({outcome})" if outcome in (BETTER, WORSE) else ""
        published = self.published.get(self.figure, {}).get(method)
        return text if published is None else f"{text} [{published}]"

    def published_cell(self, method: str, figure: str) -> str:
        """Return the published value of a method and an evaluation as text, "-" if there is none."""
        return str(self.published.get(figure, {}).get(method, "-"))

    @property
    def outcomes(self) -> dict[str, str]:
        """Return the verdict on each method for the main figure; {} without a baseline."""
        for part in self.record["findings"]:
            if part["figure"] == self.figure:
                found = {verdict["method"]: verdict["outcome"] for verdict in part["verdicts"]}
                return {self.baseline: "(baseline)"} | found
        return {}


def spread(values: Sequence[float], unit: Unit = NATS) -> str:
    """Return mean and standard deviation, as numbers in a unit; "-" without values."""
    if not values:
        return "-"
    return unit.number(mean(values)) + (f" +- {unit.number(stdev(values))}" if len(values) > 1 else "")
