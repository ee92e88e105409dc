"""scripts/setup.sh on machines that cannot be set up says so in one line."""

import re
import subprocess

import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    ("interpreter", "message"),
    [
        (None, "no .*nothing here; install Python 3.11"),
        ('case "$*" in --version) echo Python 3.9.2;; *) exit 1;; esac', "Python 3.9.2 is too old, Python 3.11"),
        ('case "$*" in *ensurepip*) exit 1;; esac', "has no venv module; install it"),
    ],
)
def test_one_line(tmp_path, interpreter, message):
    python = tmp_path / ("nothing" if interpreter is None else "python")
    if interpreter is not None:
        python.write_text(f"#!/bin/sh\n{interpreter}\n")
        python.chmod(0o755)
    command = ["bash", "scripts/setup.sh", str(python), str(tmp_path / "venv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "venv").exists()
    (line,) = done.stderr.splitlines()
    assert re.search(message, line), line
