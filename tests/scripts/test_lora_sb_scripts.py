"""LoRA-SB's three scripts: what --dry-run prints are commands that run, and they run from end to end."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from lora_one.datasets.arithmetic import generate_meta_math
from lora_one.evaluation import BENCHMARKS
from lora_one.evaluation.command import parser_of
from lora_one.evaluation.options import parsed
from lora_one.runs.composition import compose
from tests.helpers.paths import ROOT, real_model, shared

SCRIPTS = {"arithmetic": "Mistral-7B", "cr": "Llama-3.2-3B", "glue": "roberta-large"}


def run(name, *arguments, **variables):
    environment = os.environ | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / f"scripts/run_{name}.sh"), *arguments]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=900)


def commands(printed):
    """(script, arguments) of each printed command."""
    lines = [shlex.split(line) for line in printed.splitlines() if ".py " in line]
    return [(re.sub(r".*/", "", line[1]), line[2:]) for line in lines]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_prints_commands_that_are_valid(name, tmp_path):
    (tmp_path / "commonsense_170k.json").write_text("[]")
    for folder in ("CoLA", "MRPC", "meta_math", "gsm8k", "math"):
        (tmp_path / folder).mkdir()
    chosen = {"glue": {"TASKS": "cola mrpc"}}.get(name, {})
    done = run(name, "--dry-run", "model.epochs=1", DATA_DIR=str(tmp_path), SEEDS="1 2", **chosen)
    assert done.returncode == 0, done.stderr
    printed = commands(done.stdout)
    training = [arguments for script, arguments in printed if script == "run_exp.py"]
    configured = [compose(arguments) for arguments in training]
    assert len(training) == {"arithmetic": 2, "cr": 2, "glue": 2 * 4 * 2}[name]
    assert {run.seed for run in configured} == {1, 2} and {run.model.epochs for run in configured} == {1}
    assert all(SCRIPTS[name] in run.model.name and run.init.trains_core for run in configured)
    scored = [(script, arguments) for script, arguments in printed if script != "run_exp.py"]
    assert len(scored) == {"arithmetic": 4, "cr": 16, "glue": 16}[name]
    for script, arguments in scored:
        benchmark = script.removeprefix("eval_").removesuffix(".py")
        parsed(parser_of(benchmark, BENCHMARKS[benchmark]), BENCHMARKS[benchmark].options, arguments)


def test_what_is_missing_stops_the_script(tmp_path):
    done = run("cr", "--dry-run")
    assert done.returncode != 0 and "set DATA_DIR to the folder of the commonsense sets" in done.stderr
    done = run("glue", "--dry-run", DATA_DIR=str(tmp_path))
    assert done.returncode != 0 and f"DATA_DIR={tmp_path} has no folder for cola" in done.stderr


def test_a_failed_run_is_not_evaluated(tmp_path):
    done = run("glue", f"results_dir={tmp_path}", BASE_MODEL="/no/such/model", TASKS="cola", LEARNING_RATES="1e-3")
    assert done.returncode == 2 and "there is no such folder" in done.stderr
    assert [script for script, _ in commands(done.stdout)] == ["run_exp.py"]


SMALL = ["dataset.max_train_samples=64", "dataset.max_eval_samples=16", "model.epochs=1", "peft.lora_r=8"]
SMALL += ["wandb.mode=disabled", "model.bf16=false"]


def scores(folder):
    """Reports of all evaluations, by the folder's name."""
    return {file.parent.name: json.loads(file.read_text())["counts"] for file in folder.rglob("eval/**/metrics.json")}


@pytest.mark.slow
@pytest.mark.long
def test_arithmetic_on_stories(tmp_path):
    data, results = tmp_path / "data", tmp_path / "results"
    (data / "meta_math").mkdir(parents=True)
    rows = generate_meta_math(200, seed=0)
    (data / "meta_math/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "gsm8k").symlink_to(shared("data/gsm8k"))
    (data / "math").mkdir()
    problems = ROOT / "scripts/comparisons/paper/small/math.jsonl"
    (data / "math/test.jsonl").write_text(problems.read_text())
    chosen = {"BASE_MODEL": str(shared("models/stories260K-hf")), "DATA_DIR": str(data), "SEEDS": "1 2"}
    short = "--limit=4 --max_new_tokens=16"
    done = run("arithmetic", *SMALL, "model.max_length=256", f"results_dir={results}", EVAL_OPTIONS=short, **chosen)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(results.rglob("run.json"))) == 2 and len(list(results.rglob("eval/*/metrics.json"))) == 4
    assert {name: counts["total"] for name, counts in scores(results).items()} == {"gsm8k": 4, "math": 4}


@pytest.mark.slow
@pytest.mark.long
def test_commonsense_on_stories(tmp_path):
    chosen = {"BASE_MODEL": str(shared("models/stories260K-hf")), "DATA_DIR": str(shared("data/commonsense"))}
    short = "--limit=4 --max_new_tokens=8"
    batch = ["model.real_batch_size=24", "model.max_length=384", f"results_dir={tmp_path}"]
    batch += ["dataset.max_train_samples=192"]  # the start uses 170 examples
    done = run("cr", *SMALL, *batch, EVAL_OPTIONS=short, TASKS="boolq ARC-Easy", **chosen)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {name: counts["total"] for name, counts in scores(tmp_path).items()} == {"boolq": 4, "ARC-Easy": 4}


@pytest.mark.slow
@pytest.mark.long
def test_glue_on_minilm(tmp_path):
    chosen = {"BASE_MODEL": str(real_model("minilm-l6")), "DATA_DIR": str(shared("data/glue"))}
    chosen |= {"TASKS": "mrpc sst2", "LEARNING_RATES": "1e-3"}
    batch = ["model.real_batch_size=32", f"results_dir={tmp_path}"]
    done = run("glue", *SMALL, *batch, EVAL_OPTIONS="--limit=64", **chosen)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {name: counts["total"] for name, counts in scores(tmp_path).items()} == {"mrpc": 64, "sst2": 64}
