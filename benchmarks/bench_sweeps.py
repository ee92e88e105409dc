"""Measure what a sweep and a report cost beside the training: composing, skipping, locking, tables, reports.

    python benchmarks/bench_sweeps.py --json bench_sweeps.json --markdown

Finished runs are copies of one real run of three steps, with other methods, learning rates and seeds. Each case runs in
a separate process; its seconds include the imports. With --train N, N runs of three steps are really trained.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import write_result
from finished_runs import METHODS, THREE_STEPS, Grid, real_run, written

WORK = Path(__file__).with_name("sweep_work.py")
FIGURES = {
    "items": ("jobs or runs", "{:,}"),
    "seconds": ("seconds", "{:.1f}"),
    "cpu_seconds": ("CPU seconds", "{:.1f}"),
    "each_ms": ("ms each", "{:.2f}"),
    "peak_mib": ("peak memory (MiB)", "{:.0f}"),
}


def measured(name: str, items: int, work: str, *arguments: str) -> dict[str, Any]:
    """Do the work in a process of its own; return its row."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, str(WORK), str(file), work, *arguments]
        subprocess.run(command, check=True, env=os.environ | {"HYDRA_MAIN_MODULE": "__main__"})
        row = json.loads(file.read_text())
    row |= {"name": name, "items": items, "each_ms": 1000 * row["seconds"] / items}
    row["peak_mib"] = row.pop("peak_bytes") / 2**20
    print(f"{name}: {row['seconds']:.1f} s, CPU {row['cpu_seconds']:.1f} s, {row['peak_mib']:.0f} MiB", flush=True)
    return row


def sweeps(chosen: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of sweeps of several sizes: dry jobs, finished jobs, locking, the table at the end."""
    model = real_run(folder / "real")
    for jobs in chosen.jobs:
        grid, results = Grid.of(jobs, chosen.seeds), folder / f"sweep-{jobs}"
        written(grid, results, model)
        yield measured(f"finished, {jobs} jobs", jobs, "sweep", *grid.arguments(results))
        yield measured(f"locking, {jobs} folders", jobs, "locked", str(results))
        yield measured(f"final table, {jobs} jobs", jobs, "table", str(results))
        yield measured(f"dry, {jobs} jobs", jobs, "sweep", *grid.arguments(results), "dry_run=true")


def reports(chosen: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of reports on several numbers of runs, and on the last one with tests against a baseline."""
    model = real_run(folder / "real")
    for runs in chosen.runs:
        results = folder / f"report-{runs}"
        written(Grid.of(runs, chosen.seeds), results, model, evaluated=True)
        yield measured(f"report, {runs} runs, {runs // chosen.seeds} configurations", runs, "report", str(results))
    first = min(path.name for path in (results / "lora-one_arithmetic").iterdir())
    yield measured(f"report, {runs} runs, with a baseline", runs, "report", str(results), f"--baseline={first}")
    results = folder / "configurations"
    written(Grid.of(runs, 1), results, model, evaluated=True)
    yield measured(f"report, {runs} runs, as many configurations", runs, "report", str(results))


def trained(jobs: int, folder: Path) -> dict[str, Any]:
    """Return the row of a sweep that trains."""
    rates = ",".join(str(rate) for rate in Grid(jobs, 1).learning_rates)
    options = [f"model.learning_rate={rates}", *THREE_STEPS, f"results_dir={folder / 'trained'}"]
    return measured(f"trained, {jobs} jobs of 3 steps", jobs, "sweep", "-m", *options)


def linearity(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return kind -> the cost of a further item from the middle size to the largest, over that up to the middle one."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        kinds.setdefault(row["name"].partition(",")[0], []).append((row["items"], row["cpu_seconds"]))
    slopes = {
        kind: [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(found)]
        for kind, found in kinds.items()
        if len(found) == 3 and len({items for items, _ in found}) == 3
    }
    return {f"{kind}: cost of a further job, large / small": high / low for kind, (low, high) in slopes.items()}


def sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=sizes, default="100,300,1000", help="sizes of the sweeps (%(default)s)")
    parser.add_argument("--runs", type=sizes, default="1000,10000", help="numbers of reported runs (%(default)s)")
    parser.add_argument("--seeds", type=int, default=10, help=f"of each configuration; {len(METHODS)} methods")
    parser.add_argument("--train", type=int, default=0, metavar="N", help="train a sweep of N runs of three steps")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="print the table and the ratios as Markdown at the end")
    parser.set_defaults(device="cpu")
    chosen = parser.parse_args(arguments)
    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        rows += sweeps(chosen, folder) if chosen.jobs else ()
        rows += reports(chosen, folder) if chosen.runs else ()
        rows += [trained(chosen.train, folder)] if chosen.train else []
        settings = {name: getattr(chosen, name) for name in ("jobs", "runs", "seeds", "train")}
        write_result(chosen, {"settings": settings, "rows": rows, "ratios": linearity(rows)}, FIGURES)


if __name__ == "__main__":
    main()
