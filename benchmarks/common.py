"""What benchmarks share: shapes, the clock, live bytes, and how a result is handed over."""

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
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    length: int  # tokens of an example


SHAPES = {
    "small": Shape(64, 288, 2, 4, 256, 32),
    "medium": Shape(1024, 2816, 8, 16, 4096, 256),
    "llama-26m": Shape(512, 1408, 8, 8, 4096, 256),
    "llama2-7b": Shape(4096, 11008, 32, 32, 32000, 1024),
}


class Clock:
    """Seconds and CPU seconds since it was made, until stopped."""

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
    """Bytes of the tensors made while open and still alive; what an operation uses inside itself is not seen."""

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
    """Those that every benchmark takes, with its own defaults."""
    parser.add_argument("--shape", choices=SHAPES, default=shape)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; its own choice unless given")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="end with the table and the ratios as Markdown")


def set_threads(chosen: argparse.Namespace) -> None:
    if chosen.threads:
        torch.set_num_threads(chosen.threads)


def hand_over(chosen: argparse.Namespace, result: dict[str, Any], figures: dict[str, tuple[str, str]]) -> None:
    """Write {machine, versions, shape, rows, ratios} where asked to.  figures: row key -> its title and format."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    result = {"machine": machine(chosen.device), "versions": versions, **result}
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")
    if chosen.markdown:
        ratios = (f"- {name}: {value:.2f}" for name, value in result["ratios"].items())
        print(table(result["rows"], figures), *ratios, sep="\n")


def table(rows: list[dict[str, Any]], figures: dict[str, tuple[str, str]]) -> str:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    lines = [["case", *(title for title, _ in figures.values())]]
    for row in rows:
        lines.append([row["name"], *(cell(row[key], form) for key, (_, form) in figures.items())])
    return markdown(lines)


def machine(device: str) -> dict[str, Any]:
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    found = {"cpu": models[0] if models else platform.processor(), "cores": len(models), "device": device}
    found["threads"] = torch.get_num_threads()
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
