"""The recipes of docs/design.md for a benchmark and for an engine, followed in a copy of the project."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

BENCHMARK = '''
"""Copying: the completion must contain the word of the prompt."""

import json
from dataclasses import dataclass
from pathlib import Path

from lora_one.evaluation.benchmark import Benchmark
from lora_one.evaluation.options import EvaluationOptions, option
from lora_one.evaluation.shares import by_kind, counts_of, shares
from lora_one.types import Example


@dataclass(frozen=True, kw_only=True)
class MineOptions(EvaluationOptions):
    """Options of copying."""

    max_new_tokens: int = option(4, help="new tokens per completion (%(default)s)", decides="completions")
    prefix: str = option("Copy: ", help="text in front of the word (%(default)s)", decides="completions")


class Mine(Benchmark[MineOptions]):
    """Copying of words."""

    options = MineOptions

    def examples(self, options):
        words = [json.loads(line)["word"] for line in Path(options.data_path).read_text().splitlines()]
        return [Example(options.prefix + word, word, word) for word in words]

    def score(self, example_id, prompt, completion, gold):
        line = {"id": example_id, "prompt": prompt, "completion": completion, "prediction": completion, "gold": gold}
        return line | {"correct": gold in completion}

    def summarize(self, predictions):
        return shares(by_kind(predictions, {"accuracy": "correct"})), counts_of(predictions)
'''

ENGINE = '''
"""An engine that answers every prompt with the same number."""

from lora_one.evaluation.decoding import Completion
from lora_one.model_kinds import CAUSAL


class Lengths:
    def prompts(self, examples):
        return [[len(example.prompt)] for example in examples]


class Mine:
    tokenizer, encoder, kind, context = None, Lengths(), CAUSAL, 1024

    @classmethod
    def check(cls, options):
        pass

    @classmethod
    def start(cls, options):
        return cls()

    @classmethod
    def identity(cls, options):
        return {"version": "1"}

    def close(self):
        pass

    def generate(self, prompts, decoding, streams, done=()):
        for index in reversed(range(len(prompts))):
            yield index, Completion("#### 7")
'''


@pytest.fixture
def project(tmp_path):
    """A copy of what the recipes touch and need."""
    for name in ("lora_one", "eval"):
        shutil.copytree(ROOT / name, tmp_path / "project" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "project"


def insert_before(file, mark, text):
    """Insert a text before the one place that holds the mark."""
    old = file.read_text()
    assert old.count(mark) == 1
    file.write_text(old.replace(mark, text + mark))


def evaluate(project, script, *options):
    """Run an evaluation of the copy; return its metrics.json."""
    output = project.parent / "out"
    environment = os.environ | {"PYTHONPATH": str(project), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, f"eval/{script}", *options, f"--output_dir={output}"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "metrics.json").read_text())


def test_a_benchmark_touches_three_places(project):
    room = project / "lora_one/evaluation"
    (room / "mine.py").write_text(BENCHMARK.lstrip())
    table = room / "__init__.py"
    insert_before(table, '    "mmlu": mmlu.MMLU(),', '    "mine": mine.Mine(),\n')
    table.write_text(table.read_text().replace("math, mmlu, text\n", "math, mine, mmlu, text\n"))
    command = (project / "eval/eval_gsm8k.py").read_text()
    (project / "eval/eval_mine.py").write_text(command.replace("gsm8k", "mine"))
    words = project / "words.jsonl"
    words.write_text('{"word": "tree"}\n{"word": "house"}\n')
    options = ["--model_name=bundled/tiny", "--device=cpu", f"--data_path={words}", "--prefix=Say "]
    report = evaluate(project, "eval_mine.py", *options)
    assert report["task"] == "mine" and report["counts"]["total"] == 2
    assert report["settings"]["prefix"] == "Say " and report["settings"]["max_new_tokens"] == 4


def test_an_engine_touches_two_places(project):
    engines = project / "lora_one/evaluation/engines"
    (engines / "mine.py").write_text(ENGINE.lstrip())
    line = '    "mine": "lora_one.evaluation.engines.mine:Mine",\n'
    insert_before(engines / "__init__.py", "    TRANSFORMERS: ", line)
    problems = project / "problems.jsonl"
    problems.write_text('{"question": "3 + 4", "answer": "#### 7"}\n{"question": "3 + 5", "answer": "#### 8"}\n')
    options = ["--engine=mine", "--no_parity", "--model_name=mine", f"--data_path={problems}"]
    report = evaluate(project, "eval_gsm8k.py", *options)
    assert report["metrics"]["accuracy"] == 0.5 and report["model"] == "mine"


def test_the_recipes_name_the_lines_that_are_added():
    text = (ROOT / "docs/design.md").read_text()
    for line in (
        "lora_one/evaluation/mine.py",
        '"mine": mine.Mine(),',
        "eval/eval_mine.py",
        "evaluation/engines/mine.py",
    ):
        assert line in text
