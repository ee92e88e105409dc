"""Several runs as one table: a row a configuration, mean and standard deviation over its seeds."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

# column -> where it stands in run.json
COLUMNS = {
    "accuracy start": ("evaluation", "start", "eval_accuracy"),
    "after init": ("evaluation", "init", "eval_accuracy"),
    "accuracy": ("evaluation", "final", "eval_accuracy"),
    "val. loss": ("evaluation", "final", "eval_loss"),
    "init s": ("init", "seconds"),
    "train s": ("train", "seconds"),
}


def entry(record: dict[str, Any], path: Sequence[str]) -> float | None:
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation (n - 1); a single value has none."""
    if not values:
        return "-"
    return f"{mean(values):.4g}" + (f" +- {stdev(values):.2g}" if len(values) > 1 else "")


def sweep_table(runs: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    """Markdown; runs are (folder, run.json), a configuration is the folder above the seed's."""
    configurations: dict[str, list[dict[str, Any]]] = {}
    for folder, record in runs:
        configurations.setdefault(folder.parent.name, []).append(record)
    columns = [name for name, path in COLUMNS.items() if any(entry(record, path) is not None for _, record in runs)]
    rows = [["configuration", "seeds", *columns]]
    for name, records in configurations.items():
        cells = []
        for column in columns:
            values = [value for record in records if (value := entry(record, COLUMNS[column])) is not None]
            cells.append(spread(values))
        rows.append([name, str(len(records)), *cells])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
