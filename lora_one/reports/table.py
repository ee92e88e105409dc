"""The table of several runs: one row for each configuration, mean and standard deviation over its seeds."""

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lora_one.files import write_whole

# column -> its path in run.json
COLUMNS = {
    "accuracy start": ("evaluation", "start", "eval_accuracy"),
    "after init": ("evaluation", "init", "eval_accuracy"),
    "accuracy": ("evaluation", "final", "eval_accuracy"),
    "val. loss": ("evaluation", "final", "eval_loss"),
    "init s": ("init", "seconds"),
    "train s": ("train", "seconds"),
}


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


Runs = Sequence[tuple[Path, dict[str, Any]]]  # (folder, run.json)


def grouped(runs: Runs) -> tuple[list[str], dict[str, list[list[float]]], dict[str, int]]:
    """Return the columns that any run has, and for each configuration its values per column and its number of seeds.

    Runs with the same parent folder belong to one configuration.
    """
    configurations: dict[str, list[dict[str, Any]]] = {}
    for folder, record in runs:
        configurations.setdefault(folder.parent.name, []).append(record)
    columns = [name for name, path in COLUMNS.items() if any(entry(record, path) is not None for _, record in runs)]
    values = {
        name: [
            [value for record in records if (value := entry(record, COLUMNS[column])) is not None] for column in columns
        ]
        for name, records in configurations.items()
    }
    return columns, values, {name: len(records) for name, records in configurations.items()}


def sweep_table(runs: Runs) -> str:
    """Return a Markdown table with one row for each configuration."""
    columns, values, seeds = grouped(runs)
    rows = [[name, str(seeds[name]), *map(spread, cells)] for name, cells in values.items()]
    return markdown([["configuration", "seeds", *columns], *rows])


def sweep_csv(runs: Runs) -> str:
    """Return the same table as CSV in full precision; each mean is followed by its standard deviation ("sd")."""
    columns, values, seeds = grouped(runs)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["configuration", "seeds", *(f"{column}{part}" for column in columns for part in ("", " sd"))])
    for name, cells in values.items():
        parts = ((mean(cell) if cell else "", stdev(cell) if len(cell) > 1 else "") for cell in cells)
        writer.writerow([name, seeds[name], *(part for pair in parts for part in pair)])
    return text.getvalue()


def save_sweep(runs: Runs, results: Path) -> Path:
    """Write sweep-<hash>.csv and .md, with a hash over the runs; return the path of the .md. Raises OSError."""
    names = sorted(str(folder.relative_to(results)) for folder, _ in runs)
    path = results / f"sweep-{hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:8]}.md"
    write_whole(path, sweep_table(runs) + "\n")
    write_whole(path.with_suffix(".csv"), sweep_csv(runs))
    return path


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
