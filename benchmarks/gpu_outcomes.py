"""A plugin of pytest for gpu.py: one line of JSON for each test, as soon as its outcome is known, in $GPU_OUTCOMES."""

import json
import os

import pytest


class Outcomes:
    """Of a test's setup, call and teardown the first that did not pass counts, else the call."""

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
    if not hasattr(config, "workerinput"):  # of several processes the first hears of every report
        config.pluginmanager.register(Outcomes(os.environ["GPU_OUTCOMES"]))
