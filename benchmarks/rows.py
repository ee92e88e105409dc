"""A table that is written to disk row by row: resumable, with a time limit, and robust against errors in a row."""

import gc
import json
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import machine

from lora_one.reports.table import markdown

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "flash_attn")
GIB = 2**30
Row = dict[str, Any]


class Table:
    """The rows of one part in ``folder/name.json``, which is written after every row.

    A row that was already measured with the same settings, device and versions is not measured again; a row that
    failed is. settings: those that all rows share.  seconds: no row starts after this time.
    """

    def __init__(self, folder: Path, name: str, device: str, settings: Row, seconds: float):
        self.file, self.device = folder / f"{name}.json", device
        self.until = time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        where = {"machine": described(device), "versions": versions(), "settings": settings}
        self.result: Row = {"part": name, **where, "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "rows": []}
        before = json.loads(self.file.read_text()) if self.file.exists() else {}
        if {key: before.get(key) for key in where} == json.loads(json.dumps(where)):
            self.result["rows"] = [row for row in before["rows"] if "error" not in row]
        self.left: list[str] = []

    @property
    def rows(self) -> list[Row]:
        return self.result["rows"]

    def row(self, name: str, work: Callable[[], Row], **columns: Any) -> Row | None:
        """Return the row with this name, measured by ``work`` unless known; None: it failed, or the time is over."""
        known = next((row for row in self.rows if row["name"] == name), None)
        if known is not None:
            return known
        if time.monotonic() > self.until:
            self.left.append(name)
            self.write()
            return None
        began = time.monotonic()
        row: Row = {"name": name, **columns}
        try:
            row |= work()
        except Exception as error:  # the error is recorded in the row, and the next row is measured
            row |= {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()}
            row["traceback"] = row["traceback"][-6000:]
            traceback.print_exc()
        row["row_seconds"] = time.monotonic() - began
        self.rows.append(row)
        self.write()
        shown = {key: value for key, value in row.items() if key not in ("traceback", "turns")}
        print(json.dumps(shown, default=str), flush=True)
        freed()
        return None if "error" in row else row

    def value(self, name: str, key: str = "seconds") -> float | None:
        """Return a value of a row; None: the row was not measured."""
        return next((row.get(key) for row in self.rows if row["name"] == name), None)

    def write(self, **more: Any) -> None:
        """Write the table as JSON and Markdown. more: further entries besides the rows, for example ratios."""
        self.result |= more | {"not_measured_for_want_of_time": self.left}
        hidden = self.file.with_suffix(".partial")
        hidden.write_text(json.dumps(self.result, indent=1, default=str) + "\n")
        hidden.replace(self.file)
        self.file.with_suffix(".md").write_text(as_markdown(self.result))


def freed() -> None:
    """Free the memory that a row still uses: reference cycles of trainers, and the allocator's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronized() -> float:
    """Return the time after all work of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], Any], *, repeats: int = 3, seconds: float = 6.0, warm_up: bool = True) -> Row:
    """Return the median seconds of ``work``, and the peak of GPU memory in GiB, in total and beyond that at the start.

    There is a warm-up, then at least one measurement, and more while they fit in ``seconds``. If the warm-up takes
    longer than that, it is the only measurement.
    """
    on_gpu = torch.cuda.is_available()
    freed()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    first: list[float] = []
    if warm_up:
        began = synchronized()
        work()
        first.append(synchronized() - began)
    turns = [took for took in first if took > seconds]
    while not turns or (len(turns) < repeats and sum(first) + sum(turns) + turns[-1] < seconds):
        began = synchronized()
        work()
        turns.append(synchronized() - began)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    row: Row = {"seconds": median(turns), "slowest": max(turns), "fastest": min(turns), "turns": turns}
    row |= {"first_seconds": first[0] if first else None}
    return row | {
        "peak_gib": peak / GIB if on_gpu else None,
        "extra_gib": (peak - before) / GIB if on_gpu else None,
    }


def versions() -> dict[str, str]:
    """Return the versions of the installed packages."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def described(device: str) -> Row:
    """Describe the machine; with a GPU also its memory and the version of CUDA."""
    found = machine(device)
    if device.startswith("cuda"):
        memory = torch.cuda.get_device_properties(device).total_memory / GIB
        found |= {"gpus": torch.cuda.device_count(), "gpu_gib": round(memory, 1), "cuda": torch.version.cuda}
    return found


# Markdown

TITLES = {
    "name": ("case", "{}"),
    "outcome": ("outcome", "{}"),
    "seconds": ("seconds", "{:.4g}"),
    "milliseconds": ("ms", "{:.3g}"),
    "ratio_to_floor": ("ratio to floor", "{:.2f}"),
    "ratio": ("ratio", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
    "examples_per_second": ("examples/s", "{:.2f}"),
    "predicted_gib": ("predicted GiB", "{:.2f}"),
    "peak_gib": ("peak GiB", "{:.1f}"),
    "extra_gib": ("GiB beyond the start", "{:.1f}"),
    "loss": ("loss", "{:.4f}"),
    "validation_loss": ("validation loss", "{:.4f}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "interval": ("95% interval", "{}"),
    "agreement": ("equal answers", "{:.0%}"),
    "note": ("note", "{}"),
}


def as_markdown(result: Row) -> str:
    """Return a part as Markdown: machine and date, rows, ratios, failures, and rows that are missing."""
    rows = result["rows"]
    keys = [key for key in TITLES if any(row.get(key) is not None for row in rows)]
    lines = [[TITLES[key][0] for key in keys]]
    lines += [[cell(row.get(key), TITLES[key][1]) for key in keys] for row in rows]
    where = ", ".join(f"{name} {value}" for name, value in {**result["machine"], **result["versions"]}.items())
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    text = [f"## {result['part']}", "", f"{result['date']}. {where}.", "", f"Settings: {settings}.", ""]
    text += [markdown(lines), ""] if rows else ["No row was measured.", ""]
    text += [f"- {name}: {value:.2f}" for name, value in result.get("ratios", {}).items() if value is not None]
    text += [f"- failed: {row['name']}: {one_line(row['error'])}" for row in rows if "error" in row]
    left = result.get("not_measured_for_want_of_time")
    text += [f"- not measured before the time limit: {', '.join(left)}"] if left else []
    return "\n".join(text).rstrip() + "\n"


def cell(value: Any, form: str) -> str:
    return "-" if value is None else one_line(form.format(value))


def one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:300]
