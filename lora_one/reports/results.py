"""The record of a comparison, as the sections of a report read it, and what a section is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev
from typing import Any

from lora_one.reports.compare import Point, Run
from lora_one.reports.figures import Drawing, looks_of
from lora_one.reports.findings import by_seed, unit_of
from lora_one.reports.shown import main_figure, shown_methods
from lora_one.statistics.units import NATS, Unit
from lora_one.statistics.verdicts import BETTER, WORSE

Table = Sequence[Sequence[str]]
BASELINE = "(baseline)"
NOT_RUN = "not run yet"  # in the column of an evaluation that is not run


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
    """The record of a comparison, as the sections read it.

    rows, methods: those that the report shows.  runs: of all methods.  by_stage: of each method and stage, in order.
    evaluations: those that are run.  not_run: the others, with the reason.
    """

    def __init__(self, record: Mapping[str, Any]):
        self.record = record
        self.runs = [Run(**run) for run in record["runs"]]
        asked = record["comparison"]["evaluations"]
        self.not_run = {name: entry["not_run"] for name, entry in asked.items() if entry.get("not_run")}
        self.evaluations = [name for name in asked if name not in self.not_run]
        self.baseline = record["comparison"]["baseline"]
        self.by_stage: dict[tuple[str, str], list[Run]] = {}
        for run in self.runs:
            self.by_stage.setdefault((run.method, run.stage), []).append(run)
        absent = next(iter(self.not_run), None) if not self.runs else None  # nothing was run, so that it has no loss
        self.figure = absent or main_figure(self.runs, self.evaluations)
        every = [row["method"] for row in record["rows"]]
        self.methods = shown_methods(self.runs, every, self.figure, self.baseline)
        self.rows = [row for row in record["rows"] if row["method"] in self.methods]
        self.units: dict[str, Unit] = {}
        self.looks = looks_of(self.methods)
        self.keys = list(dict.fromkeys(key for run in self.runs for key in run.point))
        published = record["comparison"].get("published") or {"source": "", "values": {}}
        self.source, self.published = published["source"], published["values"]

    def of(self, method: str, stage: str) -> list[Run]:
        """Return the finished runs of a method in a stage."""
        return [run for run in self.by_stage.get((method, stage), ()) if run.error is None]

    def chosen(self, method: str) -> Point | None:
        """Return the point with which a method's seeds were run, also if they failed; None: no point was chosen."""
        return next((run.point for run in self.by_stage.get((method, "final"), ()) if run.point), None)

    @property
    def omitted(self) -> int:
        """Return the number of methods that are not shown."""
        return len(self.record["rows"]) - len(self.rows)

    def unit(self, figure: str) -> Unit:
        """Return the unit of a figure."""
        if figure not in self.units:
            self.units[figure] = unit_of(self.runs, figure)
        return self.units[figure]

    def titled(self, figure: str) -> str:
        """Return the name of a figure with the unit of its values; that of an evaluation that is not run is unknown."""
        if figure in self.not_run:
            return figure
        return f"{figure} ({self.unit(figure).value_name})"

    def by_seed(self, method: str, figure: str, stage: str = "final") -> dict[int, float]:
        """Return a figure of a method's runs in a stage, for each seed that has it."""
        return by_seed(self.of(method, stage), figure, stage).get(method, {})

    def values(self, method: str, figure: str, stage: str = "final") -> list[float]:
        """Return a figure of a method's runs in a stage, one for each seed that has it."""
        return list(self.by_seed(method, figure, stage).values())

    def summary(self, method: str) -> str:
        """Return the main figure of a method, whether it is better, worse or the baseline, and the published value."""
        text = spread(self.values(method, self.figure), self.unit(self.figure))
        text = NOT_RUN if self.figure in self.not_run and method in self.methods else text
        outcome = self.outcomes.get(method)
        text += {BETTER: f" ({BETTER})", WORSE: f" ({WORSE})", BASELINE: f" {BASELINE}"}.get(outcome, "")
        published = self.published.get(self.figure, {}).get(method)
        return text if published is None else f"{text} [{published}]"

    def published_cell(self, method: str, figure: str) -> str:
        """Return the published value of a method and an evaluation as text, "-" if there is none."""
        return str(self.published.get(figure, {}).get(method, "-"))

    @cached_property
    def outcomes(self) -> dict[str, str]:
        """Return the verdict on each method for the main figure; {} without a baseline."""
        for part in self.record["findings"]:
            if part["figure"] == self.figure:
                found = {verdict["method"]: verdict["outcome"] for verdict in part["verdicts"]}
                return {self.baseline: BASELINE} | found
        return {}


def spread(values: Sequence[float], unit: Unit = NATS) -> str:
    """Return mean and standard deviation, as numbers in a unit; "-" without values."""
    if not values:
        return "-"
    return unit.number(mean(values)) + (f" +- {unit.number(stdev(values))}" if len(values) > 1 else "")
