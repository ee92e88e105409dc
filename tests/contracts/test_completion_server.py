"""The completion server of the tests: right answers without faults, and each fault disturbs only its own request."""

import http.client
import json
import socket
import threading

import pytest
import torch

from lora_one.evaluation.choices import Question, log_likelihoods
from lora_one.models import load_model
from tests.helpers.completion_faults import FAULTS
from tests.helpers.completion_server import completion_servers

LATE = ("never_answers", "trickles")  # faults that a client ends by its time limit


@pytest.fixture(scope="module")
def model():
    return load_model("bundled/tiny", dtype="fp32")


@pytest.fixture
def serve(model, tokenizer):
    with completion_servers(model, tokenizer) as started:
        yield started


@pytest.fixture
def prompt(tokenizer):
    return tokenizer("Q: Tom has 3 apples and buys 4. How many?\nA: ")["input_ids"]  # answered: Ivy has 33-3=<<


def ask(server, path="/v1/completions", key=None, wait=20.0, **request):
    """The status and the body of an answer. wait: seconds until the connection is closed."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.connect()
    limit = threading.Timer(wait, connection.sock.shutdown, [socket.SHUT_RDWR])
    limit.start()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        if request:
            body = json.dumps({"model": "model", "temperature": 0, "max_tokens": 12} | request)
            connection.request("POST", path, body, headers)
        else:
            connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        limit.cancel()
        connection.close()


def choice(server, **request):
    status, body = ask(server, **request)
    assert status == 200, body
    return json.loads(body)["choices"][0]


def test_greedy_tokens_are_those_of_transformers(serve, model, tokenizer, prompt):
    found = choice(serve(), prompt=prompt, return_token_ids=True, max_tokens=24)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=2)
    assert found["token_ids"] == expected[0, len(prompt) :].tolist()
    assert found["prompt_token_ids"] == prompt
    assert found["text"] == tokenizer.decode(found["token_ids"], skip_special_tokens=True) != ""


def test_echo_with_logprobs_gives_the_likelihood_of_an_answer(serve, model, tokenizer, prompt):
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("9", "Tom has")]
    server, found = serve(), []
    for answer in answers:
        scores = choice(server, prompt=prompt + answer, echo=True, logprobs=1, max_tokens=0)["logprobs"]
        assert scores["token_logprobs"][0] is None and len(scores["tokens"]) == len(prompt + answer)
        found.append(sum(scores["token_logprobs"][len(prompt) :]))
    ((_, expected),) = log_likelihoods(model, [Question(prompt, answers)], batch_size=1)
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_stop_text_ends_the_completion_before_it(serve, prompt):
    server = serve()
    whole = choice(server, prompt=prompt)["text"]
    ended = choice(server, prompt=prompt, stop=[whole[2:4], "never"])
    assert (ended["text"], ended["finish_reason"], ended["stop_reason"]) == (whole[:2], "stop", whole[2:4])


def test_a_seed_decides_what_is_sampled(serve, prompt):
    server = serve()
    texts = [choice(server, prompt=prompt, temperature=3.0, seed=seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_models_and_refusals(serve, prompt):
    server = serve(key="secret", context=64)
    assert ask(server, "/v1/models")[0] == ask(server, prompt=prompt)[0] == 401
    (served,) = json.loads(ask(server, "/v1/models", key="secret")[1])["data"]
    assert (served["id"], served["max_model_len"]) == ("model", 64)
    assert ask(server, prompt=prompt * 3, key="secret")[0] == 400
    assert ask(server, prompt=prompt, key="secret", stop=list("abcde"))[0] == 400
    assert ask(server, prompt=prompt, key="secret", model="other")[0] == 404
    assert ask(server, prompt=prompt, key="secret")[0] == 200


def test_a_plan_is_a_name_a_list_a_dict_or_a_function_of_the_number(serve, prompt):
    plans = [
        "status_500",
        ["status_500", None],
        {0: "status_500"},
        lambda number: "status_500" if number == 0 else None,
    ]
    statuses = []
    for plan in plans:
        server = serve(plan)
        statuses.append([ask(server, prompt=prompt)[0] for _ in range(3)])
        assert len(server.requests) == len(server.visits) == 3
    assert statuses == [[500, 500, 500], *[[500, 200, 200]] * 3]


def outcome(server, **request):
    """The status and the choices of an answer, or the name of the error."""
    try:
        status, body = ask(server, **request)
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    try:
        answer = json.loads(body)
        return status, [(c["text"], json.dumps(c["logprobs"])) for c in answer["choices"]], answer["model"]
    except (ValueError, LookupError, TypeError):
        return status, body


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_disturbs_its_own_request_only(serve, prompt, name):
    """Except for those that a client should accept, its answer differs from the right one."""
    texts = [{"prompt": prompt}, {"prompt": prompt, "stop": ["33"]}]
    likelihoods = [{"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1}]
    disturbed = []
    for request in {"both": texts + likelihoods, "text": texts, "likelihoods": likelihoods}[FAULTS[name].reads]:
        server = serve({1: name})
        right = outcome(server, **request)
        second = outcome(server, **request, wait=0.5 if name in LATE else 20.0)
        assert right[0] == 200
        disturbed.append(second != right)
        if name == "dies":
            with pytest.raises(ConnectionRefusedError):
                ask(server, **request)
            server.start()
        assert outcome(server, **request) == right
    assert any(disturbed) == (FAULTS[name].expected != "accept" or name == "stop_texts_ignored")
