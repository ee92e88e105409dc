"""MMLU: the published prompt, the letter an independent slow loop would choose, and averages counted by hand."""

import json
import runpy
import sys
from collections import Counter

import pytest
import torch

from lora_one.datasets import mmlu as mmlu_rows
from lora_one.errors import RunError, UsageError
from lora_one.evaluation import BENCHMARKS, mmlu
from lora_one.evaluation.command import main
from lora_one.evaluation.engines.local import Transformers
from lora_one.evaluation.loading import LoadedModel
from lora_one.evaluation.mmlu_subjects import CATEGORIES, SUBJECTS
from lora_one.evaluation.partial_results import PartialResults
from tests.helpers.models import random_llama
from tests.helpers.paths import ROOT, SHARED, shared

NOTHING = '"Which word means nothing, or ""nil""?",None,NA,nan,12,A'
DEV = {
    "virology": ["Two\nand two?,1,2,3,4,D", "Is it?,yes,no,maybe,,B", "Three?,1,2,3,4,C"],
    "abstract_algebra": ["One?,1,2,3,4,A", "What is 0?,zero,one,two,three,A", NOTHING],
}
TEST = {
    "virology": ["Four?,1,2,3,4,D", NOTHING, "A long one with many words in it?,a,b,c,d,C"],
    "abstract_algebra": ["Ring?,x,y,z,w,B", "Field?,10,20,30,40,C"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """As the benchmark's files: no header, quotes where they are needed, one of them with CRLF."""
    folder = tmp_path_factory.mktemp("mmlu")
    for split, subjects in (("dev", DEV), ("test", TEST)):
        (folder / split).mkdir()
        for subject, rows in subjects.items():
            quoted = [f'"{row.replace(",", chr(34) + ",", 1)}' if row.startswith("Two") else row for row in rows]
            end = "\r\n" if subject == "virology" else "\n"
            (folder / split / f"{subject}_{split}.csv").write_bytes("".join(row + end for row in quoted).encode())
    return folder


def test_prompt_is_the_published_one_and_keeps_the_word_none(data):
    found = {problem.id: problem for problem in mmlu.test_questions(str(data), ntrain=3)}
    assert list(found) == ["abstract_algebra/0", "abstract_algebra/1", "virology/0", "virology/1", "virology/2"]
    header = "The following are multiple choice questions (with answers) about  virology.\n\n"
    shots = [
        "Two\nand two?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\n\n",
        "Is it?\nA. yes\nB. no\nC. maybe\nD. \nAnswer: B\n\n",
        "Three?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: C\n\n",
    ]
    question = 'Which word means nothing, or "nil"?\nA. None\nB. NA\nC. nan\nD. 12\nAnswer:'
    assert found["virology/1"].prompt == header + "".join(shots) + question
    assert found["virology/1"].gold == "A" and found["virology/1"].response == " A"
    assert found["virology/1"].prompt_without(2) == header + shots[2] + question
    assert "about  abstract algebra." in found["abstract_algebra/0"].prompt
    assert mmlu.test_questions(str(data), ntrain=0)[3].prompt == header + question


@torch.no_grad()
def slowly(model, tokenizer, problem, limit):
    """One text at a time without a cache: log p of each letter, dropping solved examples from the front."""
    for lost in range(4):
        prompt = problem.header + "".join(problem.shots[lost:]) + problem.body
        before = tokenizer(prompt)["input_ids"]
        texts = [tokenizer(f"{prompt} {letter}")["input_ids"] for letter in "ABCD"]
        if max(map(len, texts)) - 1 <= limit:
            break
    found = {}
    for letter, ids in zip("ABCD", texts, strict=True):
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found[letter] = sum(float(log_p[place - 1, ids[place]]) for place in range(len(before), len(ids)))
    return found, lost


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("name", "limit"), [("tokenizer", 4096), ("tokenizer", 150), ("sentencepiece_tokenizer", 130)])
def test_equals_a_slow_loop(name, limit, batch_size, data, request):
    """With a context for all examples, and with ones that hold all of them, some or none."""
    tokenizer = request.getfixturevalue(name)
    model = random_llama(len(tokenizer), max_position_embeddings=limit)
    problems = mmlu.test_questions(str(data), ntrain=3)
    found = dict(mmlu.likeliest_letters(Transformers(LoadedModel(model, tokenizer, batch_size)), problems))
    assert sorted(found) == list(range(5))
    lost = []
    for index, problem in enumerate(problems):
        expected, dropped = slowly(model, tokenizer, problem, limit)
        details = found[index].details
        assert details["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
        assert found[index].text == f" {max(expected, key=expected.get)}"
        assert (details["shots"], details.get("shots_lost", 0)) == (3 - dropped, dropped)
        assert details.get("prompt", problem.prompt) == problem.prompt_without(dropped)
        lost.append(dropped)
    assert len(set(lost)) > 1 if limit < 4096 else set(lost) == {0}


def test_a_question_beyond_the_context_keeps_its_end(tokenizer, data):
    model = random_llama(len(tokenizer), max_position_embeddings=20)
    (problem,) = [p for p in mmlu.test_questions(str(data), ntrain=3) if p.id == "virology/2"]
    ((question, details),) = mmlu.fit(tokenizer, [problem], 20)
    whole = tokenizer(problem.prompt_without(3))["input_ids"]
    assert question.length == 20 and question.context == whole[-len(question.context) :]
    assert details["tokens_cut"] == len(whole) - len(question.context) and details["shots_lost"] == 3
    assert (
        dict(mmlu.likeliest_letters(Transformers(LoadedModel(model, tokenizer, 1)), [problem]))[0].text.strip()
        in "ABCD"
    )


@pytest.mark.parametrize("name", ["tokenizer", "sentencepiece_tokenizer"])
def test_reused_letter_tokens_are_those_of_each_prompt(name, data, request):
    """Of the real prompts, where they are: one tokenization stands for those with the same ending."""
    from lora_one.evaluation.choices import question_of, questions_of

    tokenizer = request.getfixturevalue(name)
    place = SHARED / "data/mmlu" if (SHARED / "data/mmlu").exists() else data
    prompts = [problem.body for problem in mmlu.test_questions(str(place), ntrain=0)[::200]] + [
        "x",
        "Answer:",
        "y Answer:",
    ]
    letters = [" A", " B", " C", " D"]
    assert questions_of(tokenizer, prompts, letters) == [question_of(tokenizer, text, letters) for text in prompts]


def test_averages_are_over_questions():
    """math: algebra 1 of 2 and statistics 3 of 3; STEM: those and physics 0 of 1; humanities: law 1 of 4."""
    rights = {
        "abstract_algebra": "10",
        "high_school_statistics": "111",
        "astronomy": "0",
        "jurisprudence": "1000",
    }
    lines = [
        {"id": f"{subject}/{number}", "prediction": "A", "correct": bit == "1"}
        for subject, bits in rights.items()
        for number, bit in enumerate(bits)
    ]
    metrics, counts = BENCHMARKS["mmlu"].summarize(lines)
    expected = {
        "subject/abstract_algebra": (1, 2),
        "subject/high_school_statistics": (3, 3),
        "subject/astronomy": (0, 1),
        "subject/jurisprudence": (1, 4),
        "subcategory/math": (4, 5),
        "subcategory/physics": (0, 1),
        "subcategory/law": (1, 4),
        "category/STEM": (4, 6),
        "category/humanities": (1, 4),
        "accuracy": (5, 10),
    }
    for name, (right, total) in expected.items():
        p = right / total
        assert metrics.pop(name) == pytest.approx(p), name
        assert metrics.pop(f"{name}_stderr") == pytest.approx((p * (1 - p) / total) ** 0.5), name
    assert metrics == {}
    assert counts == {"correct": 5, "wrong": 5, "unparsed": 0, "total": 10}


def test_the_table_of_subjects():
    assert len(SUBJECTS) == 57 and set(SUBJECTS.values()) == set(CATEGORIES) and len(CATEGORIES) == 17
    assert set(CATEGORIES.values()) == {"STEM", "humanities", "social sciences", "other"}


def test_the_14042_real_questions():
    """The sizes of the four categories are those the benchmark's paper gives; ten cells read like missing values."""
    place = str(shared("data/mmlu"))
    problems = mmlu.test_questions(place)
    sizes = Counter(mmlu.parts_of(problem.id)[2] for problem in problems)
    expected = {"STEM": 3018, "humanities": 4705, "social sciences": 3077, "other": 3242}
    assert sizes == {f"category/{name}": size for name, size in expected.items()} and len(problems) == 14042
    assert all(len(problem.shots) == 5 for problem in problems)
    cells = [cell for rows in mmlu.read_questions(place, "test").values() for row in rows for cell in row]
    assert sum(cell in ("None", "NA", "N/A", "nan", "null", "NULL", "") for cell in cells) == 10


def test_rows_of_the_hub_have_the_same_form(monkeypatch):
    row = {"question": "One?", "choices": ["1", "None", "3", "4"], "answer": 1, "subject": "virology"}
    monkeypatch.setattr(mmlu_rows, "from_hub", lambda name, subset, split: [row] if split == "test" else [row] * 5)
    (problem,) = mmlu.test_questions(None)
    assert problem.body == "One?\nA. 1\nB. None\nC. 3\nD. 4\nAnswer:" and problem.gold == "B"
    assert len(problem.shots) == 5 and problem.shots[0] == problem.body + " B\n\n"


@pytest.mark.parametrize(
    ("file", "text", "error", "words"),
    [
        ("test/virology_test.csv", "Four?,1,2,3,4\n", RunError, "row 1: .* must be a question, four options"),
        ("test/virology_test.csv", "Four?,1,2,3,4,D\nFive?,1,2,3,4,E\n", RunError, "row 2: "),
        ("test/virology_test.csv", "", RunError, "has no rows"),
        ("test/virolgy_test.csv", "Four?,1,2,3,4,D\n", UsageError, "did you mean virology"),
        (
            "dev/virology_dev.csv",
            "Four?,1,2,3,4,D\n",
            UsageError,
            "--ntrain=3 exceeds the number of solved examples of virology",
        ),
    ],
)
def test_broken_data_is_named(file, text, error, words, tmp_path, data):
    for source in data.rglob("*.csv"):
        copy = tmp_path / source.relative_to(data)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(source.read_bytes())
    (tmp_path / file).write_text(text)
    with pytest.raises(error, match=words):
        mmlu.test_questions(str(tmp_path), ntrain=3)


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_published_command_line(tmp_path, llama_folder, data, monkeypatch, capsys):
    output = tmp_path / "out"
    options = ["--ntrain=3", f"--data_path={data}", f"--output_dir={output}"]
    monkeypatch.setattr(sys, "argv", ["eval_mmlu.py", str(llama_folder), *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "eval/eval_mmlu.py"), run_name="__main__")
    assert stop.value.code == 0 and "mmlu accuracy: " in capsys.readouterr().out
    report, lines = json.loads((output / "metrics.json").read_text()), read(output / "predictions.jsonl")
    assert set(report) == {"task", "metrics", "counts", "remarks", "model", "settings", "seconds", "provenance"}
    assert report["counts"]["correct"] + report["counts"]["wrong"] == report["counts"]["total"] == len(lines) == 5
    assert report["counts"]["unparsed"] == 0 and report["settings"]["ntrain"] == 3
    assert all({"id", "prompt", "completion", "prediction", "gold", "correct"} <= line.keys() for line in lines)
    assert "\nA. None\nB. NA\nC. nan\n" in lines[3]["prompt"]
    lost = sum("shots_lost" in line for line in lines)
    assert report["remarks"] == {"prompts_shortened": lost, "questions_cut": 0, "subjects": 2}
    # scored again without a model: the same numbers, and the log-likelihoods stay
    assert main("mmlu", [f"--rescore={output / 'predictions.jsonl'}"]) == 0
    again = json.loads((output / "rescored/metrics.json").read_text())
    assert (again["metrics"], again["counts"]) == (report["metrics"], report["counts"])
    assert read(output / "rescored/predictions.jsonl") == lines


@pytest.mark.parametrize("kept", [1, 3, 4])
def test_interrupted_evaluation_resumes_with_the_same_result(kept, tmp_path, llama_folder, data, monkeypatch):
    common = [f"--model_name={llama_folder}", f"--data_path={data}", "--ntrain=3", "--batch_size=2"]
    assert main("mmlu", [*common, f"--output_dir={tmp_path / 'whole'}"]) == 0
    add = PartialResults.add

    def stop_after(self, request, completion):
        add(self, request, completion)
        if len(self.path.read_text().splitlines()) == kept + 1:
            raise KeyboardInterrupt

    output = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(PartialResults, "add", stop_after)
        assert main("mmlu", [*common, f"--output_dir={output}"]) == 130
    seen = []
    monkeypatch.setattr(PartialResults, "add", lambda self, request, completion: seen.append(request))
    assert main("mmlu", [*common, f"--output_dir={output}"]) == 0
    assert len(seen) == 5 - kept
    assert (output / "predictions.jsonl").read_text() == (tmp_path / "whole/predictions.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ntrain=-1"], "--ntrain=-1 must be at least 0"),
        (["--temperature=0.5"], "--temperature=0.5 has no effect on MMLU"),
        (["--max_new_tokens=9"], "--max_new_tokens=9 has no effect on MMLU"),
        (["--data_path=."], "has no test/"),
    ],
)
def test_wrong_options_give_one_message(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("mmlu", ["bundled/tiny", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ") and words in line
