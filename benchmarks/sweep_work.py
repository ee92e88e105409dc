"""One case of `bench_sweeps.py`, in this process alone: python sweep_work.py <row.json> <work> <arguments>."""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

BEGAN = time.perf_counter()
WORK = {"sweep": "lora_one.runs.cli:command", "report": "lora_one.runs.report_command:main"}


def locked(results: str) -> None:
    """Lock each run of a results folder."""
    from lora_one.records.folder import RunFolder

    for folder in folders_in(results):
        with RunFolder(folder).locked():
            pass


def table(results: str) -> None:
    """Print and write the table of a finished sweep over all runs of a results folder."""
    from lora_one.records.folder import RunFolder
    from lora_one.runs.sweep import Sweep

    sweep, folders = Sweep(), folders_in(results)
    sweep.plan([{"configuration": path.parent.name, "seed": path.name} for path in folders], several=True)
    for job, path in zip(sweep.jobs, folders, strict=True):
        job.folder = RunFolder(path)
    sweep.close()


def folders_in(results: str) -> list[Path]:
    return [file.parent for file in Path(results).glob("*/*/*/run.json")]


def done(work: str, arguments: Sequence[str]) -> object:
    """Do the work; return its exit code."""
    if work in ("locked", "table"):
        return globals()[work](*arguments)
    module, _, function = WORK[work].partition(":")
    sys.argv = [work, *arguments]
    return getattr(importlib.import_module(module), function)()


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def main(row: str, work: str, *arguments: str) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = done(work, arguments)
    assert not code, f"{work}: exit code {code}"
    found = {"seconds": time.perf_counter() - BEGAN, "cpu_seconds": time.process_time(), "peak_bytes": peak_bytes()}
    Path(row).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
