"""The wheel, built from the sdist and installed in a fresh environment, without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest

from lora_one.evaluation import BENCHMARKS
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL

pytestmark = pytest.mark.slow
SOURCES = ("lora_one", "conf", "hydra_plugins", "pyproject.toml", "setup.py", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
PIP = ("-m", "pip", "--disable-pip-version-check")
OFFLINE = ("--no-deps", "--no-index", "--quiet")


def run(*command, cwd, check=True):
    """Run a command in a folder, without the environment that makes the checkout importable."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The folder of the installed commands; third-party packages are those of this interpreter."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"ignore": shutil.ignore_patterns("__pycache__")} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, source / name, **options)
    run(sys.executable, "-c", BUILD, folder, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    run(sys.executable, *PIP, "wheel", *OFFLINE, "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    (site,) = folder.glob("venv/lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, *PIP, "--python", python, "install", *OFFLINE, wheel, cwd=folder)
    shutil.rmtree(source)
    return python.parent


def test_a_run_its_merge_and_its_help(commands, tmp_path):
    """From any folder; results are written to that folder."""
    where = run(commands / "python", "-c", "import lora_one; print(lora_one.__file__)", cwd=tmp_path).stdout
    assert where.startswith(str(commands.parent))
    done = run(commands / "lora-one", *SMALL, cwd=tmp_path)
    (record,) = tmp_path.glob("results/lora-one_arithmetic/*/42/run.json")
    assert "run: " in done.stdout
    again = run(commands / "python", "-m", "lora_one", *SMALL, cwd=tmp_path)
    assert "already finished" in again.stdout
    run(commands / "lora-one-merge", record.parent, cwd=tmp_path)
    assert (record.parent / "merged_checkpoint" / "config.json").exists()
    arguments = ["--standalone", "--nproc_per_node=1", "-m", "lora_one", "seed=43", *SMALL]
    run(commands / "python", "-m", "torch.distributed.run", *arguments, cwd=tmp_path)
    assert (record.parents[1] / "43" / "run.json").exists()


@pytest.mark.parametrize(
    ("command", "called"),
    [
        (["lora-one", "seed=1", "--help"], "lora-one "),
        (["python", "-m", "lora_one", "--help"], "python -m lora_one "),
        (["lora-one-eval", "--help"], "lora-one-eval "),
        *((["lora-one-eval", name, "--help"], f"lora-one-eval {name} ") for name in BENCHMARKS),
        (["lora-one-compare", "--help"], "lora-one-compare "),
        (["lora-one-report", "--help"], "lora-one-report "),
        (["lora-one-merge", "--help"], "lora-one-merge "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_says_how_the_command_was_called(commands, tmp_path, command, called):
    said = run(commands / command[0], *command[1:], cwd=tmp_path).stdout
    assert said.lower().startswith(f"usage: {called}")
    if command[:2] == ["lora-one-eval", "--help"]:
        assert all(f"  {name}\n" in said for name in BENCHMARKS)


def test_a_choice_of_the_user_is_found_in_config_dir(commands, tmp_path):
    choice = tmp_path / "mine" / "model" / "small.yaml"
    choice.parent.mkdir(parents=True)
    choice.write_text("defaults:\n  - tiny\n  - _self_\nlearning_rate: 1e-3\nper_device_batch_size: 16\n")
    arguments = ["--config-dir", "mine", "model=small", "model.real_batch_size=8", "dry_run=true"]
    assert "lr0.001" in run(commands / "lora-one", *arguments, cwd=tmp_path).stdout


def test_a_comparison_is_planned_and_an_unknown_benchmark_refused(commands, tmp_path):
    shutil.copy(ROOT / "scripts/comparisons/scale_tiny.yaml", tmp_path)
    assert "to do" in run(commands / "lora-one-compare", "scale_tiny.yaml", "--dry-run", cwd=tmp_path).stdout
    refused = run(commands / "lora-one-eval", "gsm9k", cwd=tmp_path, check=False)
    assert refused.returncode == 2 and "did you mean gsm8k?" in refused.stderr
