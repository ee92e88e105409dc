"""Benchmarks that read likelihoods give through a server what they give with transformers."""

import json
from dataclasses import replace

import pytest

from lora_one.evaluation.command import main
from tests.helpers.commonsense import ROWS as LLM_ADAPTERS
from tests.helpers.completion_faults import FAULTS, names, patience

pytestmark = pytest.mark.usefixtures("quickly")
ROWS = ["Ring?,x,y,z,w,B", "Field?,10,20,30,40,C", "A longer one with many words in it?,a,b,c,d,C"]


def mmlu(folder):
    for split in ("dev", "test"):
        (folder / split).mkdir()
        (folder / split / f"virology_{split}.csv").write_text("".join(row + "\n" for row in ROWS))
    return ["--ntrain=2"]


def commonsense(folder):
    (folder / "boolq").mkdir()
    question = "Please answer the following question with true or false, question: is {}?\n\nAnswer format: true/false"
    rows = [
        {
            "instruction": question.format(word),
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
        for word, answer in (("water wet", "true"), ("a stone in the sea a swimmer", "false"), ("it", "true"))
    ]
    (folder / "boolq/test.json").write_text(json.dumps(rows))
    return ["--dataset=boolq", "--greedy", "--likelihood", "--max_new_tokens=6"]


def commonsense_options(folder):
    """With one solved example: options after a question, and the rest of a sentence after each option."""
    for name in ("openbookqa", "winogrande"):
        (folder / name).mkdir()
        instruction, answer, _ = LLM_ADAPTERS[name]
        opening, rest = instruction.split(": ", 1)
        rows = [{"instruction": f"{opening}: {word} {rest}", "answer": answer} for word in ("Fog", "Yes, a tree", "No")]
        (folder / name / "test.json").write_text(json.dumps(rows))
    return ["--dataset=openbookqa,winogrande", "--protocol=lm_eval", "--num_fewshot=1"]


def glue(folder):
    rows = [("A man sleeps.", "A man is awake."), ("It rains today.", "It rains."), ("No.", "Yes, it is so.")]
    lines = [f"{number}\t{one}\t{two}\tentailment" for number, (one, two) in enumerate(rows)]
    (folder / "dev.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n")
    return ["--dataset=rte", "--first_token"]


def text(folder):
    (folder / "one.txt").write_text("Tom has 3 apples and buys 4 more. Now he has 7 apples. " * 20)
    return [f"--data_path={folder / 'one.txt'}", "--max_length=100"]


def numbers_apart(value):
    """A value without its fractions, and the fractions in order."""
    if isinstance(value, float):
        return None, [value]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return value, []
    parts = {key: numbers_apart(part) for key, part in items}
    return {key: rest for key, (rest, _) in parts.items()}, [x for _, numbers in parts.values() for x in numbers]


def predictions(task, given, output, *engine):
    common = ["--model_name=bundled/tiny", "--device=cpu", f"--output_dir={output}", *engine]
    assert main(task, [*common, *given]) == 0
    return numbers_apart([json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()])


def through(server):
    return "--engine=server", f"--base_url={server.url}"


@pytest.mark.parametrize("rows", [mmlu, commonsense, commonsense_options, glue, text], ids=lambda rows: rows.__name__)
def test_likelihoods_are_those_of_transformers(rows, serve, tmp_path):
    task = rows.__name__.partition("_")[0]
    data = tmp_path / "data"
    data.mkdir()
    given = [f"--data_path={data}", *rows(data)]
    one, numbers = predictions(task, given, tmp_path / "a")
    server = serve()
    other, others = predictions(task, given, tmp_path / "b", *through(server))
    assert one == other and numbers == pytest.approx(others, abs=1e-4)
    report = json.loads((tmp_path / "b/metrics.json").read_text())
    assert report["parity"]["explained"] == 1.0


@pytest.mark.parametrize("name", names("retry", "accept", reads="likelihoods"))
def test_what_a_server_recovers_from_changes_nothing(name, serve, tmp_path):
    if name == "dies":
        pytest.skip("see test_server.py")
    data = tmp_path / "data"
    data.mkdir()
    given = [f"--data_path={data}", *text(data)]
    _, numbers = predictions("text", given, tmp_path / "a")
    server = serve(lambda number: name if number < 2 else None)
    _, others = predictions("text", [*given, *patience(name), "--no_parity"], tmp_path / "b", *through(server))
    assert numbers == pytest.approx(others, abs=1e-4)


@pytest.mark.parametrize("name", names("refuse", reads="likelihoods"))
def test_a_server_without_likelihoods_is_one_message(name, serve, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    server = serve(name)
    options = ["--model_name=bundled/tiny", f"--output_dir={tmp_path / 'out'}", "--no_parity", *text(data)]
    assert main("text", [*options, *through(server)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    if name in ("missing_logprobs", "echo_ignored"):
        assert "returns no log-probabilities of a prompt" in errors[0] and "--engine=transformers" in errors[0]


@pytest.mark.parametrize("rows", [commonsense, glue, text], ids=lambda rows: rows.__name__)
def test_a_server_that_dies_loses_no_likelihood_that_it_has_given(rows, serve, tmp_path):
    """These benchmarks need all likelihoods before the first line can be written."""
    data = tmp_path / "data"
    data.mkdir()
    given = [f"--data_path={data}", *rows(data), "--no_parity", "--concurrency=1"]
    one, numbers = predictions(rows.__name__, given[:-2], tmp_path / "a")
    server = serve({2: "dies"})
    common = ["--model_name=bundled/tiny", f"--output_dir={tmp_path / 'b'}", *through(server)]
    assert main(rows.__name__, [*common, *given]) == 1
    server.start()
    first = list(server.requests[:2])
    other, others = predictions(rows.__name__, given, tmp_path / "b", *through(server))
    assert one == other and numbers == pytest.approx(others, abs=1e-4)
    assert not any(request in first for request in server.requests[3:]), "nothing is asked again"
    assert not list((tmp_path / "b").glob("*.partial*"))


def test_wrong_likelihoods_are_warned_of(serve, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    given = [f"--data_path={data}", *commonsense(data)]
    predictions("commonsense", given, tmp_path / "out", *through(serve("shifted_logprobs")))
    assert "differ by more than rounding" in capsys.readouterr().err


def test_single_tokens_are_read_from_the_likeliest_ones(serve, tmp_path):
    """One request for a question; more only for tokens that are not among the 20 likeliest."""
    data = tmp_path / "data"
    data.mkdir()
    server = serve()
    predictions("glue", [f"--data_path={data}", *glue(data), "--no_parity"], tmp_path / "out", *through(server))
    assert sum(request.get("logprobs") == 20 for request in server.requests) == 3


def test_likelihoods_of_a_right_server_do_not_hide_its_wrong_texts(serve, tmp_path, monkeypatch):
    """With --likelihood both are compared; here the server uses other weights, but only to generate."""
    wrong = FAULTS["another_models_weights"].act
    act = lambda handler: handler.send_completion(handler.asked) if "logprobs" in handler.asked else wrong(handler)  # noqa: E731
    monkeypatch.setitem(FAULTS, "another_models_weights", replace(FAULTS["another_models_weights"], act=act))
    given = [f"--data_path={tmp_path}", f"--output_dir={tmp_path / 'out'}", *commonsense(tmp_path)]
    options = ["--model_name=bundled/tiny", "--device=cpu", *given, *through(serve("another_models_weights"))]
    assert main("commonsense", options) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["parity"]["explained"] < 0.95
