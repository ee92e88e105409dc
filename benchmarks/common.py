"""Shared by the benchmarks: model shapes, a clock, a counter of live bytes, and the output of results."""

import argparse
import json
import platform
import time
import weakref
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_one.reports.table import markdown


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, and the length of the examples in tokens."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    length: int


SHAPES = {
    "small": Shape(64, 288, 2, 4, 256, 32),
    "medium": Shape(1024, 2816, 8, 16, 4096, 256),
    "llama-26m": Shape(512, 1408, 8, 8, 4096, 256),
    "llama2-7b": Shape(4096, 11008, 32, 32, 32000, 1024),
}


class Clock:
    """Measure seconds and CPU seconds from creation to ``stop``, after waiting for the GPU."""

    def __init__(self) -> None:
        self.began = self._now()

    def stop(self) -> None:
        self.seconds, self.cpu_seconds = (now - began for now, began in zip(self._now(), self.began, strict=True))

    @staticmethod
    def _now() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


class LiveBytes(TorchDispatchMode):
    """Count the live bytes of tensors created within the block, without the internal memory of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs and storage._cdata not in self.known:
                    self.known[storage._cdata] = storage.nbytes()
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.alive)
        return result

    def _freed(self, key: int) -> None:
        self.alive -= self.known.pop(key)


def common_arguments(parser: argparse.ArgumentParser, *, shape: str, repeats: int) -> None:
    """Add the arguments of every benchmark; the defaults differ."""
    parser.add_argument("--shape", choices=SHAPES, default=shape)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch threads (default: chosen by torch)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="print the table and the ratios as Markdown at the end")


def set_threads(chosen: argparse.Namespace) -> None:
    if chosen.threads:
        torch.set_num_threads(chosen.threads)


def write_result(chosen: argparse.Namespace, result: dict[str, Any], figures: dict[str, tuple[str, str]]) -> None:
    """Write the result with machine and versions to --json, and print it with --markdown.

    figures: key of a row -> title and format of its column.
    """
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    result = {"machine": machine(chosen.device), "versions": versions, **result}
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")
    if chosen.markdown:
        ratios = (f"- {name}: {value:.2f}" for name, value in result["ratios"].items())
        print(table(result["rows"], figures), *ratios, sep="\n")


def table(rows: list[dict[str, Any]], figures: dict[str, tuple[str, str]]) -> str:
    """Return the rows as a Markdown table."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    lines = [["case", *(title for title, _ in figures.values())]]
    for row in rows:
        lines.append([row["name"], *(cell(row[key], form) for key, (_, form) in figures.items())])
    return markdown(lines)


def machine(device: str) -> dict[str, Any]:
    """Describe the machine: its CPU, cores, torch threads, device and GPU."""
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    found = {"cpu": models[0] if models else platform.processor(), "cores": len(models), "device": device}
    found["threads"] = torch.get_num_threads()
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
