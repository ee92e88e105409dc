"""The table of a sweep: one row for each configuration, mean and standard deviation over its seeds, and failed jobs."""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lora_one.files import write_whole


@dataclass(frozen=True)
class Column:
    """A figure of run.json: its path there, and its form in the printed table (times ``scale``, with ``decimals``)."""

    title: str
    path: tuple[str, ...]
    decimals: int
    scale: float = 1.0


COLUMNS = {  # by their names in the csv file, which has the unscaled values
    "accuracy start": Column("accuracy (%) pretrained", ("evaluation", "start", "eval_accuracy"), 2, 100),
    "after init": Column("after init", ("evaluation", "init", "eval_accuracy"), 2, 100),
    "accuracy": Column("accuracy (%)", ("evaluation", "final", "eval_accuracy"), 2, 100),
    "val. loss": Column("val. loss", ("evaluation", "final", "eval_loss"), 4),
    "init s": Column("init s", ("init", "seconds"), 1),
    "train s": Column("train s", ("train", "seconds"), 1),
}
PLUS_MINUS = "+-: sample standard deviation over the seeds of a row"


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep.

    values: of the keys that differ between the jobs, without the seed.  record: run.json of the finished run, which is
    in ``folder``; None: there is no result, and ``note`` says why.
    """

    values: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    record: dict[str, Any] | None = None
    note: str = ""


@dataclass
class Row:
    """A configuration with the records of its finished seeds, or one job without a result."""

    values: dict[str, str]
    configuration: str
    records: list[dict[str, Any]]
    note: str = ""

    def figures(self, name: str) -> list[float]:
        """Return the values of a column, one for each seed that has it."""
        found = (entry(record, COLUMNS[name].path) for record in self.records)
        return [value for value in found if value is not None]

    def share(self, name: str) -> str:
        """Return how many of the seeds have a value in a column, if some do not: " (2 of 3)"; else ""."""
        count = len(self.figures(name))
        return f" ({count} of {len(self.records)})" if 0 < count < len(self.records) else ""

    @property
    def accuracy_sizes(self) -> set[int]:
        """Return the numbers of examples on which the accuracy was measured."""
        sizes = (entry(record, ("evaluation", "final", "eval_accuracy_n")) for record in self.records)
        return {size for size in sizes if size is not None}


def entry(record: dict[str, Any], path: Sequence[str]) -> float | None:
    """Return the value at a path of keys; None: it does not exist."""
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def spread(values: Sequence[float]) -> str:
    """Format mean and standard deviation (n - 1); a single value has no deviation."""
    if not values:
        return "-"
    return f"{mean(values):.4g}" + (f" +- {stdev(values):.2g}" if len(values) > 1 else "")


def rows_of(jobs: Sequence[SweepJob]) -> list[Row]:
    """Return the rows in the order of the jobs; seeds of a configuration, whose folder is the same, share a row."""
    rows: list[Row] = []
    finished: dict[tuple[Any, ...], Row] = {}
    for job in jobs:
        if job.record is None:
            rows.append(Row(job.values, "", [], " ".join(job.note.split())))
            continue
        key = (*job.values.items(), job.folder.parent)
        if key not in finished:
            finished[key] = Row(job.values, job.folder.parent.name, [])
            rows.append(finished[key])
        finished[key].records.append(job.record)
    return rows


def columns_of(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Return the keys and the figures that any row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    return keys, [name for name in COLUMNS if any(row.figures(name) for row in rows)]


def sweep_table(jobs: Sequence[SweepJob]) -> str:
    """Return a Markdown table, with the decimal points of a column below each other."""
    rows = rows_of(jobs)
    keys, names = columns_of(rows)
    columns = {key: [row.values.get(key, "-") for row in rows] for key in keys}
    columns["seeds"] = [str(len(row.records)) for row in rows]
    for name in names:
        cells = aligned([row.figures(name) for row in rows], COLUMNS[name])
        columns[COLUMNS[name].title] = [cell + row.share(name) for cell, row in zip(cells, rows, strict=True)]
    columns["configuration"] = [row.configuration or "-" for row in rows]
    lines = [markdown([list(columns), *map(list, zip(*columns.values(), strict=True))]), "", PLUS_MINUS]
    for row in rows:
        if len(row.accuracy_sizes) > 1:
            sizes = " and ".join(map(str, sorted(row.accuracy_sizes)))
            lines.append(f"- {row.configuration}: the seeds' accuracy was measured on {sizes} examples")
        if row.note:
            values = ", ".join(f"{key}={value}" for key, value in row.values.items())
            lines.append(f"- {values}{', ' * bool(values)}{row.note}")
    return "\n".join(lines)


def aligned(cells: Sequence[Sequence[float]], column: Column) -> list[str]:
    """Return mean and standard deviation of each cell, all with the same number of digits before and after the point.

    >>> aligned([[0.05], [0.5, 0.7], []], COLUMNS["accuracy"])
    [' 5.00', '60.00 +- 14.14', '-']
    """
    scaled = [[column.scale * value for value in values] for values in cells]
    means = [f"{mean(values):.{column.decimals}f}" if values else "-" for values in scaled]
    errors = [f"{stdev(values):.{column.decimals}f}" if len(values) > 1 else "" for values in scaled]
    width, narrow = max(map(len, means)), max(map(len, errors))
    return [
        f"{center:>{width}}" + (f" +- {error:>{narrow}}" if error else "") if center != "-" else center
        for center, error in zip(means, errors, strict=True)
    ]


def sweep_csv(jobs: Sequence[SweepJob]) -> str:
    """Return the same table as CSV in full precision; each mean is followed by its standard deviation ("sd")."""
    rows = rows_of(jobs)
    keys, names = columns_of(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    titles = [f"{name}{part}" for name in names for part in ("", " sd")]
    writer.writerow([*keys, "configuration", "seeds", *titles, "note"])
    for row in rows:
        cells = [row.figures(name) for name in names]
        parts = ((mean(cell) if cell else "", stdev(cell) if len(cell) > 1 else "") for cell in cells)
        values = [row.values.get(key, "") for key in keys]
        writer.writerow(
            [*values, row.configuration, len(row.records), *(part for pair in parts for part in pair), row.note]
        )
    return text.getvalue()


def save_sweep(jobs: Sequence[SweepJob], results: Path) -> Path:
    """Write sweep-<hash>.csv and .md, with a hash over the finished runs; return the path of the .md. Raises OSError.

    jobs: those whose run is not in ``results`` are left out.
    """
    jobs = [job for job in jobs if job.folder is None or job.folder.is_relative_to(results)]
    names = sorted({str(job.folder.relative_to(results)) for job in jobs if job.folder is not None})
    path = results / f"sweep-{hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:8]}.md"
    write_whole(path, sweep_table(jobs) + "\n")
    write_whole(path.with_suffix(".csv"), sweep_csv(jobs))
    return path


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table; the first row is the header."""
    rows = [[plain(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def plain(text: str) -> str:
    """Return a text that Markdown shows as it is; ``<r=8>`` would be read as a tag and left out."""
    return text.replace("<", "&lt;")
