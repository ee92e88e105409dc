"""HumanEval: the published protocol, pass@k, samples on disk, and the real problems."""

import gzip
import itertools
import json
import re
from math import sqrt

import pytest

from lora_one.evaluation import BENCHMARKS, functional_correctness, humaneval, predictions
from lora_one.evaluation.command import main
from tests.helpers.models import random_llama
from tests.helpers.paths import shared

pytestmark = pytest.mark.usefixtures("isolated")
PROBLEMS = [
    {
        "task_id": f"Mine/{number}",
        "prompt": f'def add{number}(x):\n    """x plus {number}."""\n',
        "entry_point": f"add{number}",
        "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n",
    }
    for number in range(3)
]


def right(problem):
    return f"def {problem['entry_point']}(x):\n    return x + {problem['entry_point'][-1]}\n"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@pytest.fixture
def problem_file(tmp_path):
    return write(tmp_path / "problems.jsonl", PROBLEMS)


# The published protocol
def test_prompt_is_the_published_one(problem_file):
    example = BENCHMARKS["humaneval"].examples(humaneval.HumanEvalOptions(data_path=str(problem_file)))[1]
    assert example.gold == PROBLEMS[1]
    head, problem, tail = example.prompt.partition(PROBLEMS[1]["prompt"])
    assert head.startswith("Below is an instruction that describes a task.\n Write a response that appropriately")
    assert head.endswith("(4 spaces) for each level of indentation\n\ncode:\n```python\n") and problem
    assert tail == "\n```\n\n### Response:\n```python\n"


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("def f(x):\n    return x\n```\n", "def f(x):\n    return x"),
        ("  def f(x):\n      return x", "def f(x):\n    return x"),
        ("def f(x):\n\treturn x", "def f(x):\n    return x"),
        ("def f(x):\n  if x:\n    return 1\n  return 2", "def f(x):\n    if x:\n        return 1\n    return 2"),
        ('def f(x):\n    """Doc\n    string."""\n    return x', "def f(x):\n    return x"),
        ("def f(x):\n    '''Doc'''\n\n\n    return x  \n", "def f(x):\n    return x"),
        ("import math\n\ndef f(x):\n   return x", "import math\ndef f(x):\n    return x"),
        ("    return x", "return x"),  # the margin is that of "def"; without one it is 0, and 4 is the first level
        ("", ""),
    ],
)
def test_post_processing(completion, program):
    expected = "    return x" if completion == "    return x" else program
    assert humaneval.program_text(completion) == expected


# pass@k
@pytest.mark.parametrize(("n", "right_ones"), [(5, 0), (5, 1), (5, 3), (5, 5), (1, 1), (4, 2)])
def test_pass_at_k_is_the_mean_over_all_ways_to_draw_k(n, right_ones):
    outcomes = [True] * right_ones + [False] * (n - right_ones)
    for k in range(1, n + 1):
        draws = list(itertools.combinations(outcomes, k))
        expected = sum(any(draw) for draw in draws) / len(draws)
        assert humaneval.pass_at([outcomes], [k])[f"pass@{k}"] == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_the_product_of_the_paper():
    """1 - prod_{i = n - c + 1}^{n} (1 - k / i), at sizes where binomials are beyond a float."""
    for n, c, k in ((200, 7, 100), (2000, 30, 50), (5000, 1, 2500)):
        product = 1.0
        for i in range(n - c + 1, n + 1):
            product *= 1 - k / i
        assert humaneval.pass_at([[True] * c + [False] * (n - c)], [k])[f"pass@{k}"] == pytest.approx(1 - product)


def test_standard_error_is_that_of_the_mean_over_problems():
    metrics = humaneval.pass_at([[True, False], [True, True], [False, False], [False, False]], [1, 2])
    assert metrics["pass@1"] == pytest.approx((0.5 + 1 + 0 + 0) / 4) and metrics["pass@2"] == pytest.approx(0.5)
    assert metrics["pass@1_stderr"] == pytest.approx(sqrt((0.125**2 + 0.625**2 + 2 * 0.375**2) / 4 / 4))
    assert metrics["pass@2_stderr"] == pytest.approx(sqrt(0.5 * 0.5 / 4))


# Samples that are there
def test_the_164_canonical_solutions_pass_and_empty_ones_do_not(tmp_path, capsys):
    """Both as samples of each problem, so that pass@1 is a half and pass@2 is all, and nothing depends on its place."""
    file = shared("data/humaneval/HumanEval.jsonl.gz")
    with gzip.open(file, "rt") as stream:
        rows = [json.loads(line) for line in stream]
    assert len(rows) == 164
    completions = [(row["task_id"], text) for row in rows for text in (row["canonical_solution"], "")]
    samples = write(tmp_path / "s.jsonl", [{"task_id": name, "completion": text} for name, text in completions])
    options = [f"--sample_file={samples}", f"--data_path={file}", "--k=1,2", "--timeout=120"]
    assert functional_correctness.main(options) == 0
    results = read(tmp_path / "s.jsonl_results.jsonl")
    assert [(line["task_id"], line["completion"]) for line in results] == completions
    assert all(line.keys() == {"task_id", "completion", "passed", "result"} for line in results)
    assert [line["passed"] for line in results] == [True, False] * 164
    assert {line["result"] for line in results[::2]} == {"passed"}
    assert all(line["result"].startswith("failed: ") for line in results[1::2])
    report = json.loads((tmp_path / "s.jsonl_metrics.json").read_text())
    assert (report["metrics"]["pass@1"], report["metrics"]["pass@2"]) == (0.5, 1.0)
    assert report["counts"] == {"correct": 164, "wrong": 164, "unparsed": 0, "total": 328}
    assert "humaneval pass@1: 50.00 % (standard error 0.00)" in capsys.readouterr().out


def test_results_contain_the_outcome_of_each_sample(tmp_path, problem_file):
    completions = [right(PROBLEMS[0]), "    while True: pass\n", "    return x +\n"]
    samples = [{"task_id": f"Mine/{i}", "completion": text, "note": i} for i, text in enumerate(completions)]
    file = tmp_path / "samples.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(sample) + "\n" for sample in samples).encode()))
    options = [f"--sample_file={file}", f"--problem_file={problem_file}", "--timeout=1.5"]
    assert functional_correctness.main(options) == 0
    results = read(tmp_path / "samples.jsonl.gz_results.jsonl")
    assert [line["note"] for line in results] == [0, 1, 2]
    assert [line["result"].partition(":")[0] for line in results[1:]] == ["timed out", "failed"]
    assert results[0]["result"] in ("passed", "timed out")  # a busy machine may not start it in time
    counts = json.loads((tmp_path / "samples.jsonl.gz_metrics.json").read_text())["counts"]
    assert counts["unparsed"] == 1 and sum(counts.values()) == 6


def test_allow_missing_scores_only_problems_with_samples(tmp_path, problem_file):
    file = write(tmp_path / "s.jsonl", [{"task_id": "Mine/2", "completion": right(PROBLEMS[2])}] * 2)
    options = [f"--sample_file={file}", f"--data_path={problem_file}", "--k=2,1", "--timeout=60"]
    assert functional_correctness.main(options) == 2
    assert functional_correctness.main([*options, "--allow_missing"]) == 0
    metrics = json.loads((tmp_path / "s.jsonl_metrics.json").read_text())["metrics"]
    assert metrics == {"pass@1": 1.0, "pass@1_stderr": 0.0, "pass@2": 1.0, "pass@2_stderr": 0.0}


# From a model to a score
class Generated:
    """In the place of a model: completions by (problem, sample), and the requests that reached it."""

    def __init__(self, monkeypatch):
        self.asked = []
        self.stop_after = None
        monkeypatch.setattr(predictions, "engine_class", lambda name: self)

    def start(self, options):
        return self

    @property
    def encoder(self):
        return self

    def prompts(self, examples):
        self.examples = examples
        return [[0] for _ in examples]

    def close(self):
        pass

    def generate(self, prompts, decoding, streams, done=()):
        from lora_one.evaluation.decoding import Completion

        for place, stream in reversed(list(enumerate(streams))):
            if self.stop_after == len(self.asked):
                raise KeyboardInterrupt
            problem, sample = map(int, stream.split(":"))
            self.asked.append((problem, sample))
            good = right(self.examples[problem].gold)
            yield place, Completion(f"{good}```" if sample <= problem else f"{good.rstrip()} + 5")


def command_of(problem_file, output, *more):
    common = ["--model_name=bundled/tiny", f"--data_path={problem_file}", f"--output_dir={output}"]
    return [*common, "--timeout=60", "--num_sample=3", *more]


def test_samples_are_scored_and_written(tmp_path, problem_file, monkeypatch):
    Generated(monkeypatch)
    output = tmp_path / "out"
    assert main("humaneval", command_of(problem_file, output)) == 0
    report = json.loads((output / "metrics.json").read_text())
    assert set(report) == {"task", "metrics", "counts", "model", "settings", "seconds", "provenance"}
    assert report["counts"] == {"correct": 6, "wrong": 3, "unparsed": 0, "total": 9}
    assert report["metrics"]["pass@1"] == pytest.approx((1 / 3 + 2 / 3 + 1) / 3)
    assert report["metrics"]["pass@3"] == 1.0 and "pass@10" not in report["metrics"]
    assert report["settings"]["num_sample"] == 3
    assert (report["settings"]["temperature"], report["settings"]["top_p"]) == (0.8, 0.95)
    lines = read(output / "predictions.jsonl")
    assert [line["id"] for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {"id", "prompt", "completion", "prediction", "gold", "correct"} <= lines[0].keys()
    samples = read(output / "samples.jsonl")
    assert samples == [{"task_id": line["gold"]["task_id"], "completion": line["prediction"]} for line in lines]
    assert not list(output.glob("*partial*"))
    # the samples, scored by themselves, and the predictions, scored again, come to the same
    options = [f"--sample_file={output / 'samples.jsonl'}", f"--data_path={problem_file}", "--timeout=60", "--k=1,3"]
    assert functional_correctness.main(options) == 0
    assert json.loads((output / "samples.jsonl_metrics.json").read_text())["metrics"] == report["metrics"]
    assert main("humaneval", [f"--rescore={output / 'predictions.jsonl'}", "--timeout=60"]) == 0
    again = json.loads((output / "rescored/metrics.json").read_text())
    assert (again["metrics"], again["counts"]) == (report["metrics"], report["counts"])


def test_killed_evaluation_resumes_from_its_completions(tmp_path, problem_file, monkeypatch, capsys):
    generated = Generated(monkeypatch)
    output = tmp_path / "out"
    generated.stop_after = 4
    assert main("humaneval", command_of(problem_file, output)) == 130
    partial = output / "predictions.partial.jsonl"
    partial.write_text(partial.read_text() + '[0, 0, "def ad')  # the line it was in the middle of
    assert main("humaneval", command_of(problem_file, output, "--seed=1")) == 2  # other settings: not these completions
    assert "--overwrite" in capsys.readouterr().err
    generated.asked.clear()
    generated.stop_after = None
    assert main("humaneval", command_of(problem_file, output, "--workers=1")) == 0
    assert sorted(generated.asked) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    whole = tmp_path / "whole"
    assert main("humaneval", command_of(problem_file, whole)) == 0
    assert (output / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()


def test_no_score_generates_and_a_second_call_scores(tmp_path, problem_file, monkeypatch):
    generated = Generated(monkeypatch)
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(humaneval, "run_programs", None)
        patch.setattr(humaneval, "check_isolation", None)
        assert main("humaneval", command_of(problem_file, output, "--no_score")) == 0
    assert len(read(output / "samples.jsonl")) == 9 and not (output / "metrics.json").exists()
    generated.asked.clear()
    assert main("humaneval", command_of(problem_file, output)) == 0
    assert generated.asked == [] and (output / "metrics.json").exists()


def test_one_sample_is_greedy_and_several_are_drawn(tmp_path, problem_file, tokenizer):
    """With a model, to the end: nothing random it writes is a right program."""
    random_llama(len(tokenizer), max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    common = [f"--model_name={tmp_path / 'model'}", f"--data_path={problem_file}", "--max_new_tokens=8", "--timeout=60"]
    for name, more in {"one": [], "many": ["--num_sample=3"], "again": ["--num_sample=3", "--batch_size=2"]}.items():
        assert main("humaneval", [*common, f"--output_dir={tmp_path / name}", *more]) == 0
        report = json.loads((tmp_path / name / "metrics.json").read_text())
        assert report["metrics"]["pass@1"] == 0 and report["counts"]["total"] == (3 if name == "one" else 9)
    assert report["settings"]["temperature"] == 0.8
    texts = [[line["completion"] for line in read(tmp_path / name / "predictions.jsonl")] for name in ("many", "again")]
    assert texts[0] == texts[1] and len(set(texts[0])) > 3


def test_without_isolation_nothing_is_generated(tmp_path, problem_file, monkeypatch, capsys, refusing_kernel):
    generated = Generated(monkeypatch)
    assert main("humaneval", command_of(problem_file, tmp_path / "out")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: .*cannot be isolated.*--unsafe", line) and generated.asked == []
    assert main("humaneval", command_of(problem_file, tmp_path / "out", "--unsafe")) == 0
