"""The part ``plan`` of gpu.py: the memory that a dry run predicts, compared with the peak of allocated memory.

Random weights of the shape, examples of one length, one process; see bench_plan.py, which does the same on a CPU.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bench_plan import EXAMPLES, RANK, STEPS, cases_of, settings
from common import SHAPES
from gpu_init import random_llama
from rows import GIB, Row, Table


def main(chosen: argparse.Namespace, _: str) -> int:
    """Measure every way to store gradients, and training."""
    name = "small" if chosen.small else "llama2-7b"
    shape = SHAPES[name]
    options = {"shape": name, "rank": RANK, "length": shape.length, "examples": EXAMPLES, "steps": STEPS}
    table = Table(chosen.out, "plan", chosen.device, options | {"dtype": "bfloat16"}, chosen.seconds)
    base = random_llama(shape, chosen.device, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        base.config.save_pretrained(folder)
        run = settings(shape, Path(folder), 1, bf16=True, sharded=False)
        for title, case in cases_of(base, run, shape, 1).items():
            table.row(title, partial(in_gib, case))
    table.write()
    return int(any("error" in row for row in table.rows))


def in_gib(case: Callable[[], Row]) -> Row:
    row = case()
    gib = {"predicted_gib": row["predicted"], "peak_gib": row["measured"]}
    return {name: 1e6 * value / GIB for name, value in gib.items()} | {"ratio": row["ratio"]}
