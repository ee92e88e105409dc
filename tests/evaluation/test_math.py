"""MATH: 63 problems of our own, extraction, both comparisons, and comparisons that do not end."""

import importlib.util
import json
import multiprocessing
from math import sqrt
from pathlib import Path

import pytest

from lora_one.evaluation import loading, math
from lora_one.evaluation.command import main
from lora_one.evaluation.equality import compared, equal
from lora_one.evaluation.partial_results import PartialResults

pytest.importorskip("math_verify", reason="MATH is scored by math-verify: pip install -e .[math]")
PROBLEMS = Path(__file__).parent / "math_problems.jsonl"
ENDLESS = "9^{9^{9^{9}}}"  # one multiplication that no handler interrupts


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Answers
@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed{4}. The answer is: 5", "4"),
        ("2+3=5. The answer is: 5.\nDone", "5"),
        (r"$\boxed 9$ apples", "9"),
        ("\\boxed 9.\nDone", "9"),
        ("\\boxed{5}\n\n### Instruction: \\boxed{6}", "5"),
        (r"\boxed{5} Response: \boxed{6}", "5"),
        (r"\boxed{5 Instruction }", None),
        (r"\boxed{5} and \boxed{6", None),
        (r"\boxed{}", None),
        (r"\boxedx{5}", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_extraction(completion, answer):
    assert math.parse(completion) == answer


def test_accepts_equivalent_answers_and_rejects_wrong_ones():
    rows = read(PROBLEMS)
    assert len(rows) >= 60 and len({row["problem"] for row in rows}) == len(rows)
    assert {row["level"] for row in rows} == {f"Level {level}" for level in range(1, 6)}
    assert len({row["type"] for row in rows}) == len(math.SUBJECTS)
    wanted = {"solution": True, "equivalent": True, "wrong": False}
    golds = [math.last_boxed(row["solution"]) for row in rows]
    pairs = [(equal, gold, math.parse(row[form])) for gold, row in zip(golds, rows, strict=True) for form in wanted]
    outcomes = dict(compared(pairs, 60, 2))
    mistaken = {pairs[index] for index, outcome in outcomes.items() if outcome != [*wanted.values()][index % 3]}
    assert len(outcomes) == len(pairs) and not mistaken


def test_endless_comparison_is_killed_and_the_others_are_scored():
    pairs = [("5", ENDLESS), ("1", "1"), ("5", ENDLESS), ("1", "2"), ("2", "2")]
    assert dict(compared([(equal, *pair) for pair in pairs], 3, 1)) == {0: None, 1: True, 2: None, 3: False, 4: True}
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("answer", "other", "same"),
    [
        (r"\frac12", r"\dfrac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        ("3/4", r"\frac34", True),
        (r"\frac1{72}", r"\frac{1}{72}", True),
        (r"2\sqrt3", r"2\sqrt{3}", True),
        (r"90^\circ", r"90^{\circ}", True),
        (r"90^\circ", "90", True),
        (r"13\text{ cm}", "13", True),
        (r"\$68", "68", True),
        (r"25\%", "25", True),
        ("25%", "25", False),
        (r"\sqrt 3", r"\sqrt{3}", False),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        ("x = 5", "5", True),
        (".25", "0.25", True),
        ("y=2x", "2x", True),
        ("abc=5", "5", False),
        (r"\text{odd}", "odd", False),
        ("0.25", r"\frac14", False),
        ("4,3", "3,4", False),
    ],
)
def test_published_comparison_compares_texts(answer, other, same):
    assert (math.normalized(answer) == math.normalized(other)) is same


# Scores
def predictions(path, answers):
    """Lines of an evaluation, from (completion, gold answer, level)."""
    golds = [{"answer": gold, "level": f"Level {level}"} for _, gold, level in answers]
    rows = zip(golds, answers, strict=True)
    return write(path, [{"id": i, "prompt": "p", "completion": a[0], "gold": g} for i, (g, a) in enumerate(rows)])


def test_the_official_score_reads_what_follows_the_answer_is(tmp_path):
    """As MATH_eval.py of LoRA-SB: the last one, up to a full stop at the end of a line; a box is not read."""
    benchmark, wanted, lines = math.Math(), [], []
    for completion, official in (
        ("2+3=5. The answer is: 5", True),
        ("The answer is: 6. No. The answer is: 5.\nDone", True),
        (r"first \boxed{4} then The answer is: 5.", True),
        (r"so \boxed{5}.", False),
        ("The answer is 5", False),
    ):
        wanted.append(official)
        lines.append(benchmark.score(0, "p", completion, {"answer": "5"}))
    judged = benchmark.judge(lines, math.MathOptions(workers=1), tmp_path)
    assert [line["correct_official"] for line in judged] == wanted
    assert benchmark.remarks(judged) == {"undecided": 0}
    assert benchmark.remarks(judged[3:]) == {"undecided": 0, "unmarked": 2}


def test_rescore_needs_no_model_and_counts_undecided_comparisons(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_evaluated", None)
    answers = [
        (r"\boxed{0.25}", r"\frac14", 1),
        (r"\boxed{3}", "4", 1),
        ("no", "0", 2),
        (rf"\boxed{{{ENDLESS}}}", "5", 2),
    ]
    file = predictions(tmp_path / "predictions.jsonl", answers)
    assert main("math", [f"--rescore={file}", "--timeout=4", "--workers=1"]) == 0
    report = json.loads((tmp_path / "rescored/metrics.json").read_text())
    assert report["counts"] == {"correct": 1, "wrong": 2, "unparsed": 1, "total": 4}
    assert report["remarks"] == {"undecided": 1, "unmarked": 4} and report["settings"] == {"timeout": 4}
    metrics = report["metrics"]
    assert (metrics["accuracy"], metrics["accuracy_official"]) == (0.25, 0)
    assert metrics["accuracy_stderr"] == pytest.approx(sqrt(0.25 * 0.75 / 4))
    assert (metrics["accuracy/Level 1"], metrics["accuracy/Level 2"]) == (0.5, 0)
    lines = read(tmp_path / "rescored/predictions.jsonl")
    assert [line["result"] for line in lines] == ["equal", "different", "unparsed", "undecided"]


def test_interrupted_evaluation_resumes(tmp_path, llama_folder, monkeypatch):
    real, out = PartialResults.add, tmp_path / "out"
    options = [f"--model_name={llama_folder}", f"--data_path={PROBLEMS}", "--limit=4", "--max_new_tokens=4"]
    options += [f"--output_dir={out}", "--batch_size=1", "--workers=1"]

    def interrupted(kept, request, completion):
        real(kept, request, completion)
        raise KeyboardInterrupt

    monkeypatch.setattr(PartialResults, "add", interrupted)
    assert main("math", options) == 130
    added = []
    monkeypatch.setattr(PartialResults, "add", lambda *arguments: added.append(arguments[1]) or real(*arguments))
    assert main("math", options) == 0
    assert len(added) == 3
    lines = read(out / "predictions.jsonl")
    assert [line["id"] for line in lines] == [0, 1, 2, 3]
    assert lines[0]["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSolve $3x + 7 = 22$ for $x$.\n\n### Response: Let's think step by step."
    )
    assert lines[0]["gold"] == {"answer": "5", "level": "Level 1", "type": "Algebra"}
    counts = json.loads((out / "metrics.json").read_text())["counts"]
    assert counts["correct"] + counts["wrong"] + counts["unparsed"] == counts["total"] == 4


# Data
def test_reads_the_published_folders(tmp_path):
    for subject, numbers in (("geometry", (10, 9)), ("algebra", (1,))):
        (tmp_path / "test" / subject).mkdir(parents=True)
        for number in numbers:
            row = {"problem": f"{subject} {number}", "solution": rf"\boxed{{{number}}}", "type": subject}
            (tmp_path / "test" / subject / f"{number}.json").write_text(json.dumps(row, indent=4))
    found = math.problems(str(tmp_path))
    assert [example.gold["answer"] for example in found] == ["1", "9", "10"]
    assert found[1].gold == {"answer": "9", "type": "geometry"}
    assert math.problems(str(tmp_path / "test")) == found


@pytest.mark.parametrize(
    ("rows", "code", "told"),
    [
        ([{"problem": "p", "answer": "5"}], 2, "no column solution"),
        ([], 1, "no rows"),
        ([{"problem": "p", "solution": r"\boxed{1}"}, {"problem": "p", "solution": "it is 5"}], 1, "row 2: "),
        ([{"problem": "p", "solution": r"\boxed{1"}], 1, "row 1: "),
    ],
)
def test_bad_data_is_named_before_anything_is_loaded(tmp_path, rows, code, told, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_evaluated", None)
    file = write(tmp_path / "test.jsonl", rows)
    assert main("math", ["--model_name=m", f"--data_path={file}", f"--output_dir={tmp_path / 'out'}"]) == code
    error = capsys.readouterr().err
    assert told in error and error.count("\n") <= 2


@pytest.mark.parametrize("option", ["--timeout=0", "--timeout=nan", "--workers=0"])
def test_bad_options(option, capsys):
    assert main("math", ["--model_name=m", option]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_missing_package_gives_one_line(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else real(name))
    assert main("math", ["--model_name=m"]) == 2
    assert capsys.readouterr().err.endswith("not installed: pip install 'lora-one[math]'\n")
