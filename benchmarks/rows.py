"""A table that grows row by row on disk: resumable, within a budget of seconds, and no row's error loses another."""

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
    """The rows of one part in ``folder/name.json``, written again after every row.

    A row that was measured before, with the same settings, device and versions, is kept and not measured again; one
    that failed is tried again. settings: what all rows share.  seconds: no row begins later than this.
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
        """The row of that name: known already, or what ``work`` measures; None where it failed or time is over."""
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
        except Exception as error:  # of a library or ours: the row says which, and the next one is measured
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
        """A number of a row that was measured, else None."""
        return next((row.get(key) for row in self.rows if row["name"] == name), None)

    def write(self, **more: Any) -> None:
        """more: further entries beside the rows, such as ratios."""
        self.result |= more | {"not_measured_for_want_of_time": self.left}
        hidden = self.file.with_suffix(".partial")
        hidden.write_text(json.dumps(self.result, indent=1, default=str) + "\n")
        hidden.replace(self.file)
        self.file.with_suffix(".md").write_text(as_markdown(self.result))


def freed() -> None:
    """Give back what a row has left: reference cycles of trainers, and the allocator's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronized() -> float:
    """The time, after all work of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], Any], *, repeats: int = 3, seconds: float = 6.0, warm_up: bool = True) -> Row:
    """Median seconds of ``work`` after one warm-up, and the peak of GPU memory in GiB, in all and beyond the start.

    At least one measurement; further ones while they fit in ``seconds``. Work that takes longer than that in the
    warm-up is not done again: the warm-up is its measurement.
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
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def described(device: str) -> Row:
    """The machine; on a GPU also its memory and CUDA's version."""
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
    "ratio_to_floor": ("to its floor", "{:.2f}"),
    "ratio": ("ratio", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
    "examples_per_second": ("examples/s", "{:.2f}"),
    "peak_gib": ("peak GiB", "{:.1f}"),
    "extra_gib": ("beyond the start GiB", "{:.1f}"),
    "loss": ("loss", "{:.4f}"),
    "validation_loss": ("validation loss", "{:.4f}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "interval": ("95% interval", "{}"),
    "agreement": ("answers alike", "{:.0%}"),
    "note": ("note", "{}"),
}


def as_markdown(result: Row) -> str:
    """A part for readers: where and when, its rows, its ratios, what failed and what is missing."""
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
    text += [f"- not measured for want of time: {', '.join(left)}"] if left else []
    return "\n".join(text).rstrip() + "\n"


def cell(value: Any, form: str) -> str:
    return "-" if value is None else one_line(form.format(value))


def one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:300]
