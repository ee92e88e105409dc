"""The comparison with transformers tells a wrong prompt, template, stop text or checkpoint from rounding."""

import doctest
import json

import pytest

from lora_one.evaluation import command
from lora_one.evaluation.decoding import Completion
from lora_one.evaluation.engines import parity
from lora_one.evaluation.engines.parity import Difference, Parity
from tests.helpers.completion_faults import names

pytestmark = pytest.mark.usefixtures("quickly")


@pytest.fixture
def evaluated(tmp_path):
    """A function that runs GSM8K through a server, and returns the exit code."""
    rows = [{"question": f"Tom has {n} apples and buys {n + 2}. How many?", "answer": f"#### {n}"} for n in range(40)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(server, *more):
        engine = ["--engine=server", f"--base_url={server.url}", f"--output_dir={tmp_path / 'out'}"]
        common = ["--model_name=bundled/tiny", "--device=cpu", f"--data_path={tmp_path / 'test.jsonl'}"]
        return command.main("gsm8k", [*common, *engine, "--max_new_tokens=16", *more])

    return run


def found(tmp_path):
    return json.loads((tmp_path / "out/metrics.json").read_text())["parity"]


def test_a_right_server_is_equal(evaluated, serve, tmp_path, capsys):
    assert evaluated(serve(), "--limit=8") == 0
    assert found(tmp_path) | {"differences": []} == {
        "prompts": 8,
        "equal_completions": 8,
        "equal_answers": 8,
        "unparsed": 8,
        "differences": [],
        "explained": 1.0,
    }
    said = capsys.readouterr().err
    told = "8 completions are equal, 8 answers are equal (8 of them unparsed in both)"
    assert f"parity with transformers on 8 prompts: {told}" in said
    assert "warning" not in said


NOT_SEEN = ("stripped_text", "stop_texts_ignored")  # completions are decoded and cut here
REFUSED = {  # by what the server itself says
    "prompt_begins_with_one_more_token",
    "prompt_without_its_first_token",
    "prompt_cut_on_the_left",
    "another_template",
    "half_the_length",
    "prompt_cut_on_the_left_unseen",  # by the number of log-probabilities
    "another_template_unseen",
}


@pytest.mark.parametrize("name", names("parity", reads="text"))
def test_what_only_a_comparison_can_show_is_warned_of_or_refused(name, evaluated, serve, tmp_path, capsys):
    code = evaluated(serve(name), "--limit=8")
    said = capsys.readouterr().err
    if name in REFUSED:
        assert code == 1 and not (tmp_path / "out/metrics.json").exists()
    elif name in NOT_SEEN:
        assert code == 0 and found(tmp_path)["explained"] == 1.0
    else:
        assert code == 0 and found(tmp_path)["explained"] < 0.95
        assert "differ by more than rounding (0.5 nats, or 2% of a log-likelihood)" in said


def test_the_comparison_is_made_once(evaluated, serve, tmp_path, monkeypatch):
    """An evaluation that goes on after an error has it already; with --no_parity there is none."""
    server = serve({8 + 1: "status_401"})
    assert evaluated(server, "--limit=8", "--concurrency=1") == 1
    monkeypatch.setattr(parity, "reference", None)
    assert evaluated(server, "--limit=8") == 0 and found(tmp_path)["prompts"] == 8
    assert evaluated(server, "--limit=7", "--no_parity", "--overwrite") == 0
    assert "parity" not in json.loads((tmp_path / "out/metrics.json").read_text())


def test_a_server_that_is_not_there_is_said_before_transformers_is_asked(evaluated, serve, monkeypatch, capsys):
    server = serve()
    server.stop()
    monkeypatch.setattr(parity, "reference", None)
    assert evaluated(server) == 1
    assert "does not answer as it should, after 3 attempts" in capsys.readouterr().err


def test_a_difference_between_almost_equal_tokens_is_rounding():
    near = [Difference(3, 17, 0.2), Difference(9, 40, 0.01)]
    text = Parity(32, 30, 31, 0, near).lines()
    assert len(text) == 1 and text[0].endswith(
        "the others differ from token 18 on or later; log-probabilities there differ by at most 0.2 nats"
    )
    far = [Difference(number, 0, value) for number, value in ((1, 0.6), (2, None))]
    (_, warning) = Parity(32, 30, 30, 0, far).lines()
    assert warning.startswith("warning: 2 of 32 prompts (examples 1, 2) differ by more than rounding")


def test_compared_examples_are_spread_over_the_data():
    assert parity.chosen(5) == [0, 1, 2, 3, 4]
    assert len(set(parity.chosen(1319))) == 32 and parity.chosen(1319)[-1] > 1250


@pytest.mark.parametrize(
    ("value", "other", "rounding"), [(-80.0, -81.5, True), (-80.0, -82.0, False), (-3.0, -3.6, False)]
)
def test_the_limit_of_a_log_likelihood_grows_with_it(value, other, rounding):
    """In bf16 the sums over an answer of Gemma 3 270M differ by up to 1.1 % between two batch sizes."""
    one, two = (Completion("a", details={"log_likelihoods": {"a": number, "b": -1.0}}) for number in (value, other))
    assert parity.difference_of(None, 0, [1], one, two).rounding is rounding
    assert parity.difference_of(None, 0, [1], one, one) is None


def test_a_corrected_server_is_compared_again_and_not_mixed_with_the_wrong_one(evaluated, serve, tmp_path, capsys):
    partial = tmp_path / "out/predictions.partial.jsonl"
    wrong = serve(lambda number: "status_401" if partial.exists() else "another_models_weights")
    assert evaluated(wrong, "--limit=12", "--concurrency=1") == 1
    right = serve()
    assert evaluated(right, "--limit=12") == 2
    assert "has completions of another server or model" in capsys.readouterr().err
    assert evaluated(right, "--limit=12", "--overwrite") == 0 and found(tmp_path)["explained"] == 1.0


def test_a_server_that_fails_during_the_comparison_leaves_none(evaluated, serve, tmp_path):
    server = serve(lambda number: "status_401" if number >= 8 else "another_models_weights")
    assert evaluated(server, "--limit=8") == 1 and not (tmp_path / "out/parity.json").exists()
    server.plan = None
    assert evaluated(server, "--limit=8") == 0 and found(tmp_path)["explained"] == 1.0


def test_doctests():
    assert doctest.testmod(parity).failed == 0
