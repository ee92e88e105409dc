"""The commonsense sets: what counts as an answer, the published prompt and decoding, likelihoods beside it."""

import json
import runpy
import sys

import pytest
import torch

from lora_one.evaluation import BENCHMARKS, commonsense
from lora_one.evaluation.command import main
from lora_one.evaluation.partial_results import PartialResults
from tests.helpers.models import random_llama
from tests.helpers.paths import ROOT, shared

SIZES = {
    "boolq": 3270,
    "piqa": 1838,
    "social_i_qa": 1954,
    "hellaswag": 10042,
    "winogrande": 1267,
    "ARC-Easy": 2376,
    "ARC-Challenge": 1172,
    "openbookqa": 500,
}


@pytest.mark.parametrize(
    ("name", "completion", "ours", "published"),
    [
        ("boolq", "the correct answer is true", "true", "true"),
        ("boolq", "the correct answer is false", "false", "false"),
        ("boolq", "The correct answer is True.", "true", None),
        ("boolq", "FALSE", "false", None),
        ("boolq", "True, that is, not false", "true", "false"),
        ("boolq", "false or true", "false", "false"),
        ("boolq", "truefalse", "true", "true"),
        ("boolq", "yes", None, None),
        ("boolq", "", None, None),
        ("boolq", "answer1", None, None),
        ("piqa", "the correct answer is solution2", "solution2", "solution2"),
        ("piqa", "solution 1", None, None),
        ("piqa", "solution3, so solution1", "solution1", "solution1"),
        ("piqa", "SOLUTION1solution2", "solution1", "solution2"),
        ("social_i_qa", "answer3answer3answer3", "answer3", "answer3"),
        ("social_i_qa", "The answer is (1)", None, None),
        ("hellaswag", "ending4 is right, ending1 is wrong", "ending4", "ending4"),
        ("hellaswag", "Ending2", "ending2", None),
        ("hellaswag", "ending5", None, None),
        ("winogrande", "\n\noption2\n", "option2", "option2"),
        ("winogrande", "none of the options", None, None),
        ("ARC-Easy", "the correct answer is answer5", "answer5", "answer5"),
        ("ARC-Challenge", "answer0 or answer4", "answer4", "answer4"),
        ("openbookqa", "answer1\n\n### Instruction:\nmore\n\n### Response:\nanswer2", "answer1", "answer2"),
    ],
)
def test_the_first_word_counts(name, completion, ours, published):
    """Ours in any case; the published one as it is written, and of the last response the model wrote."""
    assert commonsense.parse(completion, name) == ours
    assert commonsense.parse_published(completion, name) == published


def test_missing_answer_is_wrong_and_counted_separately():
    lines = [
        BENCHMARKS["commonsense"].score(f"boolq/{i}", "p", text, gold)
        for i, (text, gold) in enumerate([("true", "true"), ("True", "true"), ("true", "false"), ("?", "false")])
    ]
    assert [line["prediction"] for line in lines] == ["true", "true", "true", None]
    metrics, counts = BENCHMARKS["commonsense"].summarize(lines)
    assert counts == {"correct": 2, "wrong": 1, "unparsed": 1, "total": 4}
    half, quarter = (0.5 * 0.5 / 4) ** 0.5, (0.25 * 0.75 / 4) ** 0.5
    expected = {
        "accuracy": 0.5,
        "accuracy_stderr": half,
        "accuracy_official": 0.25,
        "accuracy_official_stderr": quarter,
    }
    assert metrics == pytest.approx(expected)


def test_several_sets_by_hand():
    """boolq 1 of 1, piqa 1 of 4: over all 2 of 5, the mean of sets 5/8 with the error of piqa's half."""
    texts = [("boolq", "true", "true"), *(("piqa", "solution1", f"solution{n}") for n in (1, 2, 2, 2))]
    lines = [
        BENCHMARKS["commonsense"].score(f"{name}/{i}", "p", text, gold) for i, (name, text, gold) in enumerate(texts)
    ]
    metrics, _ = BENCHMARKS["commonsense"].summarize(lines)
    assert metrics["accuracy/boolq"] == 1 and metrics["accuracy/piqa"] == 0.25 and metrics["accuracy"] == 0.4
    assert metrics["accuracy/mean"] == 0.625
    assert metrics["accuracy/mean_stderr"] == pytest.approx((0.25 * 0.75 / 4) ** 0.5 / 2)
    assert "accuracy_likelihood" not in metrics
    assert all(f"{name}_stderr" in metrics for name in metrics if not name.endswith("_stderr"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sets as LLM-Adapters gives them."""
    folder = tmp_path_factory.mktemp("commonsense")
    questions = [
        "Is water wet?",
        "Do stones swim in the sea?",
        "Is it?",
        "Is a day as long as an hour?",
        "Are two one?",
    ]
    rows = {
        "boolq": [
            (f"{text}\n\nAnswer format: true/false", ["true", "false"][i % 2]) for i, text in enumerate(questions)
        ],
        "ARC-Easy": [
            ("One?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3", "answer2"),
            ("Two?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2", "answer1"),
        ],
    }
    for name, pairs in rows.items():
        (folder / name).mkdir()
        lines = [
            {"instruction": text, "input": "", "output": f"the correct answer is {word}", "answer": word}
            for text, word in pairs
        ]
        (folder / name / "test.json").write_text(json.dumps(lines))
    return folder


def test_prompt_is_the_published_one_to_the_letter(data):
    example = commonsense.test_rows(str(data), "boolq")[0]
    assert example.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nIs water wet?\n\nAnswer format: true/false\n\n### Response:\n"
    )
    assert (example.response, example.gold, example.id) == ("the correct answer is true", "true", "boolq/0")


def test_sets_and_limits(data):
    """The limit counts in each set; a set alone may be given by its own folder or file."""
    both = [example.id for example in commonsense.test_rows(str(data), "ARC-Easy,boolq", 2)]
    assert both == ["ARC-Easy/0", "ARC-Easy/1", "boolq/0", "boolq/1"]
    alone = [commonsense.test_rows(str(data / place), "boolq") for place in ("", "boolq", "boolq/test.json")]
    assert alone[0] == alone[1] == alone[2] and len(alone[0]) == 5


@pytest.mark.parametrize("name", SIZES)
def test_the_real_sets_have_their_published_sizes(name):
    """And the words of every row are among those that are looked for, the gold answer among the row's own."""
    shared(f"data/commonsense/{name}")
    examples = commonsense.test_rows(str(shared("data/commonsense")), name)
    assert len(examples) == SIZES[name]
    assert all(example.gold in commonsense.allowed_words(name, example.prompt) for example in examples)
    lines = [BENCHMARKS["commonsense"].score(e.id, e.prompt, e.response, e.gold) for e in examples]
    assert BENCHMARKS["commonsense"].summarize(lines)[1] == {
        "correct": len(lines),
        "wrong": 0,
        "unparsed": 0,
        "total": len(lines),
    }


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "random"
    random_llama(len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def evaluate(model_folder, data, output, *more):
    common = [f"--base_model={model_folder}", f"--data_path={data}", f"--output_dir={output}", "--max_new_tokens=6"]
    assert main("commonsense", [*common, "--dataset=boolq,ARC-Easy", *more]) == 0
    return (output / "predictions.jsonl").read_text()


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_greedy_does_not_depend_on_the_batch(tmp_path, model_folder, data):
    found = [
        evaluate(model_folder, data, tmp_path / size, "--greedy", f"--batch_size={size}") for size in ("1", "3", "8")
    ]
    assert found[0] == found[1] == found[2] and len({line["completion"] for line in lines_of(found[0])}) > 1


def test_published_beams_are_seeded(tmp_path, model_folder, data):
    first, again, other = (
        evaluate(model_folder, data, tmp_path / name, "--temperature=2", "--top_p=1", f"--seed={seed}")
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other
    settings = json.loads((tmp_path / "a/metrics.json").read_text())["settings"]
    assert (settings["beams"], settings["top_k"], settings["drawn_together"]) == (4, 40, 16)


def test_likelihood_is_that_of_the_whole_response(tmp_path, model_folder, data, tokenizer):
    """Of the words the question allows; against the model on each text alone."""
    lines = lines_of(evaluate(model_folder, data, tmp_path, "--greedy", "--likelihood", "--batch_size=3"))
    model = random_llama(len(tokenizer), max_position_embeddings=512)
    for line in lines:
        words = commonsense.FORMAT.findall(line["prompt"])[-1].split("/")
        expected = {}
        for word in words:
            before = tokenizer(line["prompt"])["input_ids"]
            ids = tokenizer(f"{line['prompt']}the correct answer is {word}")["input_ids"]
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected[word] = sum(float(log_p[place - 1, ids[place]]) for place in range(len(before), len(ids)))
        assert line["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        assert line["prediction_likelihood"] == max(expected, key=expected.get)
        assert line["correct_likelihood"] == (line["prediction_likelihood"] == line["gold"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert metrics["accuracy_likelihood"] == sum(line["correct_likelihood"] for line in lines) / len(lines)


@pytest.mark.parametrize("more", [("--greedy", "--likelihood"), ("--temperature=2", "--top_p=1")])
def test_interrupted_evaluation_resumes_with_the_same_result(more, tmp_path, model_folder, data, monkeypatch):
    """Sampled beams too, which share their random numbers with the rest of their batch."""
    whole = evaluate(model_folder, data, tmp_path / "whole", "--batch_size=2", *more)
    add = PartialResults.add

    def stop_after(self, request, completion):
        add(self, request, completion)
        if len(self.path.read_text().splitlines()) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialResults, "add", stop_after)
        with pytest.raises(AssertionError):
            evaluate(model_folder, data, tmp_path / "stopped", "--batch_size=2", *more)
    assert evaluate(model_folder, data, tmp_path / "stopped", "--batch_size=2", *more) == whole


@pytest.mark.parametrize("script", ["eval_commonsense.py", "commonsense_evaluate.py"])
def test_the_published_command_line(script, tmp_path, model_folder, data, monkeypatch, capsys):
    """Data where the published script looks for it, results of a set in their own folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").symlink_to(data)
    published = f"--dataset boolq --base_model {model_folder} --name test --batch_size 1".split()
    monkeypatch.setattr(sys, "argv", [script, *published, "--limit=2", "--max_new_tokens=4", "--wandb_mode=disabled"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "eval" / script), run_name="__main__")
    assert stop.value.code == 0 and "commonsense accuracy: " in capsys.readouterr().out
    (report,) = (
        json.loads(file.read_text()) for file in tmp_path.glob("eval_results/*/commonsense/boolq/metrics.json")
    )
    assert set(report) == {"task", "metrics", "counts", "remarks", "model", "settings", "seconds", "provenance"}
    assert report["counts"]["total"] == 2 and report["settings"]["temperature"] == 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset=bolq"], "--dataset=bolq is not a commonsense set: did you mean boolq? valid: ARC-Challenge"),
        (["--dataset=boolq,"], "--dataset= is not a commonsense set"),
        (["--greedy", "--temperature=0.5"], "--greedy and --temperature=0.5 contradict each other"),
        ([], "pass --data_path="),
        (["--data_path=."], "has no folder boolq with a test.json"),
        (
            ["--data_path=boolq.json", "--dataset=piqa"],
            "row 1: the answer 'true' is not an answer of piqa (solution1, solution2)",
        ),
    ],
)
def test_wrong_options_give_one_message(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boolq.json").write_text('[{"instruction": "Is it?", "answer": "true"}]')
    assert main("commonsense", ["--base_model=bundled/tiny", *options]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ") and words in line
