"""The part ``correctness`` of gpu.py: the tests marked gpu, one row each; those that passed are not run again."""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from rows import Row, Table

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/whole/test_gpu.py"
PROCESSES = 4  # that share the GPU, if pytest-xdist is installed


def main(chosen: argparse.Namespace) -> int:
    """Run the tests; return 1 if a test failed, time was over or pytest could not run, else 0."""
    settings = {"tests": TESTS}
    table = Table(chosen.out, "correctness", chosen.device, settings, chosen.seconds)
    table.result["rows"] = [row for row in table.rows if row["outcome"] == "passed"]
    command = [sys.executable, "-m", "pytest", TESTS, "-m", "gpu", "-W", "default", "-p", "gpu_outcomes"]
    command += ["-p", "no:cacheprovider", "--tb=short"]
    command += [f"--deselect={TESTS}::{row['name']}" for row in table.rows]
    if chosen.device != "cpu" and importlib.util.find_spec("xdist"):
        command += ["-n", str(PROCESSES), "--dist", "worksteal"]
    known = len(table.rows)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.jsonl"
        file.touch()
        paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]))
        environment = {"GPU_OUTCOMES": str(file), "GPU_TESTS_ON": chosen.device.partition(":")[0], "PYTHONPATH": paths}
        environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # required by deterministic kernels
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < table.until:
                time.sleep(0.5)
                taken(table, file, known)
        finally:
            late = process.poll() is None
            if late:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            taken(table, file, known)
    table.left = ["the tests that are not in the table"] if late else []
    counts = {outcome: sum(row["outcome"] == outcome for row in table.rows) for outcome in outcomes(table.rows)}
    table.write(counts=counts, exit_code=code)
    print(f"correctness: {counts}", flush=True)
    return 0 if code in (0, 5) and not late else 1  # 5: no test left, all have passed before


def taken(table: Table, file: Path, known: int) -> None:
    """Update the table from the lines of the file, and write it if there are new ones."""
    whole = file.read_text().rpartition("\n")[0]
    rows = [row_of(json.loads(line)) for line in whole.splitlines()]
    if len(rows) > len(table.rows) - known:
        table.result["rows"] = table.rows[:known] + rows
        table.write()


def row_of(line: Row) -> Row:
    """Return one test outcome as a row of the table; a failed test has its traceback."""
    why = line.pop("why")
    if line["outcome"] == "failed":
        last = [text for text in why.splitlines() if text.startswith("E ")] or why.splitlines()[-1:]
        return line | {"error": last[0][:500], "traceback": why[-6000:]}
    return line | {"note": why or None}


def outcomes(rows: list[Row]) -> list[str]:
    """Return the different outcomes."""
    return sorted({row["outcome"] for row in rows})
