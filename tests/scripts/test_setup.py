"""scripts/setup.sh on machines that cannot be set up says so in one line."""

import os
import re
import shutil
import subprocess

import pytest

from tests.helpers.paths import ROOT


@pytest.mark.parametrize(
    ("interpreter", "message"),
    [
        (None, "nothing not found; install Python 3.11"),
        (
            'case "$*" in --version) echo Python 3.9.2;; *) exit 1;; esac',
            "Python 3.9.2 is too old; install Python 3.11",
        ),
        ('case "$*" in *ensurepip*) exit 1;; esac', "has no venv module; install it"),
    ],
)
def test_setup_errors_are_one_line(tmp_path, interpreter, message):
    python = tmp_path / ("nothing" if interpreter is None else "python")
    if interpreter is not None:
        python.write_text(f"#!/bin/sh\n{interpreter}\n")
        python.chmod(0o755)
    command = ["bash", "scripts/setup.sh", str(python), str(tmp_path / "venv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "venv").exists()
    (line,) = done.stderr.splitlines()
    assert re.search(message, line), line


@pytest.mark.parametrize("fetched", [True, False])
def test_ci_downloads_models_before_slow_tests_and_tolerates_failure(fetched, tmp_path):
    (tmp_path / "project/.ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/run", tmp_path / "project/.ci/run")
    scripts = {
        "bin/make": 'echo "make $*"',
        "bin/slurmctld": "",
        "shared/models/fetch_real.sh": 'echo "fetch $*"' + ("" if fetched else "; echo no network >&2; exit 1"),
    }
    for name, text in scripts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": "/home/me", "CI": "true"}
    command = ["bash", str(tmp_path / "project/.ci/run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    fetch = "fetch /home/me/.cache/real_models .venv/bin/python"
    assert (
        done.stdout.splitlines() == ["make lint", fetch, "make docs", "make test", "make test-slow"]
        and done.returncode == 0
    )
    assert done.stderr.splitlines()[:1] == ([] if fetched else ["no network"])
    assert ("tests that need them are skipped" in done.stderr) != fetched
    (tmp_path / "bin/make").write_text('#!/bin/sh\necho "make $*"\n[ "$1" != docs ]\n')
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "make docs", (
        "documentation that is not built ends it"
    )
