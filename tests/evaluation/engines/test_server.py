"""The engine of a server gives what transformers gives, whatever the server does wrong meanwhile."""

import json
import os
import signal
import threading
import time

import httpx
import pytest

from lora_one.data.encode import prompt_ids
from lora_one.evaluation import command
from lora_one.evaluation.engines import connection
from lora_one.evaluation.engines.server import version_of
from lora_one.models import load_tokenizer
from tests.helpers.chat import chat_model
from tests.helpers.completion_faults import FAULTS, names, patience

pytestmark = pytest.mark.usefixtures("quickly")
PROBLEMS = [f"Tom has {number} apples and buys {number + 2} more. How many?" for number in range(3, 9)]


@pytest.fixture
def problems(tmp_path):
    file = tmp_path / "test.jsonl"
    rows = [{"question": text, "answer": f"#### {number}"} for number, text in enumerate(PROBLEMS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def options(problems, tmp_path):
    def of(server=None, *more, output="out"):
        common = ["--model_name=bundled/tiny", "--device=cpu", f"--data_path={problems}", "--max_new_tokens=24"]
        engine = [] if server is None else ["--engine=server", f"--base_url={server.url}", "--no_parity"]
        return [*common, *engine, f"--output_dir={tmp_path / output}", *more]

    return of


def lines(folder):
    return (folder / "predictions.jsonl").read_text()


def report(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("more", [(), ("--num_fewshot=2", "--max_new_tokens=60")])
def test_completions_are_those_of_transformers(more, options, serve, tmp_path):
    assert command.main("gsm8k", options(None, *more, output="a")) == 0
    server = serve()
    assert command.main("gsm8k", options(server, *more, output="b")) == 0
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert report(tmp_path / "b")["engine"] == {
        "name": "server",
        "software": "vllm",
        "version": "0.0.test",
        "model": "model",
    }
    assert report(tmp_path / "b")["settings"]["engine"] == "server" and "engine" not in report(tmp_path / "a")
    assert server.most_at_once > 1


def test_the_server_gets_prompts_in_the_chat_template(options, serve, tmp_path):
    server, folder = serve(), chat_model(tmp_path / "model")
    assert command.main("gsm8k", options(server, f"--model_name={folder}", "--chat_template=true")) == 0
    prompts = [json.loads(line)["prompt"] for line in lines(tmp_path / "out").splitlines()]
    expected = prompt_ids(load_tokenizer(str(folder)), prompts, chat=True)
    assert sorted(request["prompt"] for request in server.requests) == sorted(expected)


def test_the_checkpoints_sampling_defaults_are_switched_off(options, serve, tmp_path):
    """vLLM takes them from generation_config.json."""
    assert command.main("gsm8k", options(output="a")) == 0
    server = serve(repetition_penalty=5.0, temperature=3.0, top_k=2, top_p=0.5)
    assert command.main("gsm8k", options(server, output="b")) == 0
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_each_sample_has_a_seed_of_its_own_that_only_its_name_determines(options, serve, tmp_path):
    server = serve()
    sampled = ["--temperature=1.5", "--seed=3"]
    for output in ("a", "b"):
        assert command.main("gsm8k", options(server, *sampled, "--limit=3", output=output)) == 0
    assert command.main("gsm8k", options(server, "--temperature=1.5", "--limit=3", output="c")) == 0
    assert lines(tmp_path / "a") == lines(tmp_path / "b") != lines(tmp_path / "c")
    assert len({request["seed"] for request in server.requests[:3]}) == 3


@pytest.mark.parametrize("name", [name for name in names("retry", "accept", reads="text") if name != "dies"])
def test_what_a_server_recovers_from_changes_nothing(name, options, serve, tmp_path):
    assert command.main("gsm8k", options(output="a")) == 0
    server = serve(lambda number: name if number < 2 else None)
    assert command.main("gsm8k", options(server, *patience(name), output="b")) == 0
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


@pytest.mark.parametrize("name", names("refuse", reads="text"))
def test_what_cannot_be_repeated_is_one_message_and_loses_nothing(name, options, serve, tmp_path, capsys):
    assert command.main("gsm8k", options(output="a")) == 0
    server = serve(lambda number: name if number == 4 else None)
    capsys.readouterr()
    assert command.main("gsm8k", options(server, "--concurrency=1", output="b")) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and len(server.requests) == 5
    server.plan = None
    assert command.main("gsm8k", options(server, output="b")) == 0
    assert len(server.requests) == 7, "the first four are not asked again"
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_a_server_that_dies_loses_no_completion_that_it_has_given(options, serve, tmp_path):
    server = serve({3: "dies"})
    assert command.main("gsm8k", options(server, "--concurrency=1")) == 1
    server.start()
    assert command.main("gsm8k", options(server)) == 0
    assert len(server.requests) == 4 + 3
    assert report(tmp_path / "out")["counts"]["total"] == 6


def test_what_is_complete_is_scored_without_a_server(options, serve, tmp_path, monkeypatch):
    """Everything was generated, but the scores were not written."""
    server = serve()
    monkeypatch.setattr(command, "report_of", None)
    with pytest.raises(TypeError):
        command.main("gsm8k", options(server))
    server.stop()
    monkeypatch.undo()
    assert command.main("gsm8k", options(server)) == 0
    assert report(tmp_path / "out")["engine"]["version"] == "0.0.test" and len(server.requests) == 6


def test_a_request_that_always_fails_ends_after_some_attempts(options, serve, capsys):
    server = serve("status_503")
    assert command.main("gsm8k", options(server, "--limit=1")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"after {connection.ATTEMPTS} attempts (status 503" in error and "same command again" in error


def test_another_version_of_the_server_is_not_mixed_in(options, serve, tmp_path, capsys, monkeypatch):
    server = serve({3: "dies"})
    assert command.main("gsm8k", options(server, "--concurrency=1")) == 1
    server.start()
    monkeypatch.setattr("lora_one.evaluation.engines.server.version_of", lambda _: "2")
    capsys.readouterr()
    assert command.main("gsm8k", options(server)) == 2
    assert "the engine's version is 0.0.test there and 2 here" in capsys.readouterr().err


def test_the_key_is_sent_and_never_written(options, serve, tmp_path, monkeypatch, capsys):
    server = serve(key="a secret of 21 letters")
    assert command.main("gsm8k", options(server)) == 1
    assert f"environment variable {connection.KEY}" in capsys.readouterr().err
    monkeypatch.setenv(connection.KEY, "another")
    assert command.main("gsm8k", options(server)) == 1
    monkeypatch.setenv(connection.KEY, "a secret of 21 letters")
    assert command.main("gsm8k", options(server)) == 0
    said = capsys.readouterr()
    texts = [file.read_text() for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not any("secret" in text for text in (*texts, said.out, said.err))


@pytest.mark.parametrize("key", ["a secret\x00key", "a secret k\u00e9y"])
def test_a_key_that_cannot_be_sent_is_not_shown(key, options, serve, monkeypatch, capsys):
    monkeypatch.setattr(connection.os, "environ", {**os.environ, connection.KEY: key})
    assert command.main("gsm8k", options(serve())) == 2
    said = capsys.readouterr().err
    assert f"variable {connection.KEY} has characters that a key cannot have" in said and "secret" not in said


def test_white_space_around_a_key_is_left_out(options, serve, monkeypatch):
    monkeypatch.setenv(connection.KEY, "a secret of 21 letters\r\n")
    assert command.main("gsm8k", options(serve(key="a secret of 21 letters"), "--limit=1")) == 0


def test_a_server_that_repeats_the_key_does_not_bring_it_into_a_message(monkeypatch):
    monkeypatch.setenv(connection.KEY, "sk-12345")
    answer = connection.httpx.Response(400, json={"error": {"message": "Bearer sk-12345 may not do this"}})
    assert connection.said(answer) == "Bearer <the key> may not do this"


@pytest.mark.parametrize("url", ["http://host:port", "http://[::1", "host:8000", "ftp://host", "http://host:70000"])
def test_what_is_not_an_address_is_said_at_once(url, options, capsys):
    assert command.main("gsm8k", [*options(), "--engine=server", f"--base_url={url}"]) == 2
    assert f"--base_url={url} is not an address" in capsys.readouterr().err


def test_a_body_that_cannot_be_decompressed_is_asked_again(options, serve, tmp_path):
    assert command.main("gsm8k", options(output="a")) == 0
    server = serve({1: "wrong_encoding"})
    assert command.main("gsm8k", options(server, output="b")) == 0
    assert lines(tmp_path / "a") == lines(tmp_path / "b") and len(server.requests) == 7


def test_another_model_of_the_server_is_not_mixed_in(options, serve, capsys):
    """A comparison with transformers is not repeated, so it would not show it."""
    first, second = serve({3: "dies"}, name="one"), serve(name="two")
    assert command.main("gsm8k", options(first, "--concurrency=1")) == 1
    capsys.readouterr()
    assert command.main("gsm8k", options(second)) == 2
    assert "the engine's model is one there and two here" in capsys.readouterr().err


def test_a_model_that_is_not_served_is_named(options, serve, capsys):
    server = serve(name="served")
    assert command.main("gsm8k", options(server, "--served_model=other")) == 1
    assert "--served_model=other is not a model of the server" in capsys.readouterr().err
    assert command.main("gsm8k", options(server, "--served_model=served")) == 0
    server.stop()
    assert command.main("gsm8k", options(server, "--served_model=served")) == 0, "finished, so no server is needed"
    assert command.main("gsm8k", options(server, "--served_model=other")) == 2
    assert "the engine's model is served there and other here" in capsys.readouterr().err


@pytest.mark.parametrize("first", [httpx.ConnectError("reset"), httpx.Response(503)])
def test_the_version_of_a_server_is_asked_for_again(first, serve, monkeypatch):
    """Otherwise unfinished results could not be continued after one failed request."""
    connected = connection.Connection(serve().url, timeout=5)
    answers = iter([first, httpx.Response(200, json={"version": "0.0.test"})])

    def sent(*_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(connected, "sent", sent)
    assert version_of(connected) == "0.0.test"
    monkeypatch.setattr(connected, "sent", lambda *_: httpx.Response(404, json={"detail": "Not Found"}))
    assert version_of(connected) is None


def test_no_server_is_said_at_once(options, serve, capsys):
    server = serve()
    server.stop()
    assert command.main("gsm8k", options(server)) == 1
    assert "after 3 attempts (ConnectError: [Errno 111] Connection refused)" in capsys.readouterr().err


def test_a_smaller_context_than_needed_is_said_before_the_first_request(options, serve, capsys):
    server = serve(context=40)
    assert command.main("gsm8k", options(server)) == 1
    assert "accepts 40: start it with a larger context" in capsys.readouterr().err and not server.requests


def test_an_interrupted_evaluation_does_not_wait_for_answers(options, serve, tmp_path, capsys):
    """The requests in flight never end; their threads would otherwise keep the process alive."""
    server = serve(lambda number: "never_answers" if number >= 2 else None)

    saved = tmp_path / "out/predictions.partial.jsonl"

    def interrupt():
        end = time.monotonic() + 120
        while time.monotonic() < end and not (saved.exists() and saved.read_text().count("\n") == 1 + 2):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)  # raise_signal would not wake the main thread

    threading.Thread(target=interrupt, daemon=True).start()
    assert command.main("gsm8k", options(server)) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    assert len(saved.read_text().splitlines()) == 1 + 2


def test_every_fault_of_a_server_is_met_here_or_in_the_test_of_parity():
    assert {entry.expected for entry in FAULTS.values()} == {"retry", "refuse", "accept", "parity"}
    assert len(FAULTS) >= 20
