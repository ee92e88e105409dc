"""A pytest plugin for gpu.py: append the outcome of each test to the file $GPU_OUTCOMES, as a line of JSON."""

import json
import os

import pytest


class Outcomes:
    """Write the outcome of a test: of the first phase (setup, call, teardown) that did not pass, else of the call."""

    def __init__(self, file: str):
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        outcome, why = report.outcome, str(report.longrepr) if report.longrepr else ""
        if hasattr(report, "wasxfail"):
            outcome, why = "as feared" if report.skipped else report.outcome, report.wasxfail
        elif report.skipped and isinstance(report.longrepr, tuple):
            why = report.longrepr[2].removeprefix("Skipped: ")
        line = {"name": report.nodeid.partition("::")[2], "outcome": outcome, "seconds": report.duration, "why": why}
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # with pytest-xdist, the main process receives every report
        config.pluginmanager.register(Outcomes(os.environ["GPU_OUTCOMES"]))
