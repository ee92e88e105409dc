"""Faults in the content of a completion server's answers; see completion_faults.py.

"parity" faults answer another request than was sent, or with another model.
"""

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.helpers.completion_faults import Expected, Reads, fault

if TYPE_CHECKING:
    from tests.helpers.completion_server import Handler

Json = dict[str, Any]
Change = Callable[[Json], Json]
PAGE = "<!DOCTYPE html><html><head><title>It works!</title></head><body>Default page of another server</body></html>"


def answer_fault(expected: Expected, reads: Reads = "both") -> Callable[[Change], Change]:
    """Register a fault: the decorated function changes the right answer."""

    def registered(change: Callable[[Json], Any]) -> Callable[[Json], Any]:
        def act(handler: "Handler") -> None:
            handler.send_completion(handler.asked, change)

        act.__name__ = change.__name__
        fault(expected, reads)(act)
        return change

    return registered


def choice_fault(expected: Expected, reads: Reads = "both") -> Callable[[Change], Change]:
    """Register a fault: the decorated function returns what differs in each choice."""

    def registered(change: Change) -> Change:
        def changed(answer: Json) -> Json:
            return answer | {"choices": [choice | change(choice) for choice in answer["choices"]]}

        changed.__name__ = change.__name__
        answer_fault(expected, reads)(changed)
        return change

    return registered


def request_fault(expected: Expected, reads: Reads = "both") -> Callable[[Change], Change]:
    """Register a fault: the decorated function returns what the server reads differently in the request."""

    def registered(change: Change) -> Change:
        def act(handler: "Handler") -> None:
            handler.send_completion(handler.asked | change(handler.asked))

        act.__name__ = change.__name__
        fault(expected, reads)(act)
        return change

    return registered


# --- the form of the answer


@fault("refuse")
def another_server(handler):
    """The page of another server, with the status 200."""
    handler.send(200, PAGE)


@fault("retry")
def invalid_json(handler):
    """Half of the right answer as a whole body."""
    data = json.dumps(handler.owner.completer.answer(handler.asked))
    handler.send(200, data[: len(data) // 2], {"Content-Type": "application/json"})


@fault("retry")
def empty_body(handler):
    """Status 200 and no body."""
    handler.send(200, None)


@answer_fault("retry")
def error_with_status_200(answer):
    """An error message with the status of success."""
    return {"object": "error", "message": "out of memory", "code": 500}


@answer_fault("retry")
def a_list(answer):
    """Valid JSON, but not an object."""
    return [answer]


@answer_fault("retry")
def no_choices(answer):
    """An empty list of choices."""
    return answer | {"choices": []}


@answer_fault("retry")
def too_few_choices(answer):
    """The last choice is missing."""
    return answer | {"choices": answer["choices"][:-1]}


@answer_fault("retry")
def too_many_choices(answer):
    """The last choice twice, the second time with the next index."""
    last = answer["choices"][-1]
    return answer | {"choices": [*answer["choices"], last | {"index": last["index"] + 1}]}


@answer_fault("accept")
def choices_in_another_order(answer):
    """The choices from the last to the first; their indices are right."""
    return answer | {"choices": answer["choices"][::-1]}


@answer_fault("accept")
def only_the_fields_of_openai(answer):
    """No token ids and no stop reason, as other servers answer."""
    known = ("index", "text", "logprobs", "finish_reason")
    return answer | {"choices": [{name: choice[name] for name in known} for choice in answer["choices"]]}


@answer_fault("refuse")
def another_model_answers(answer):
    """A router has chosen another model, and says so."""
    return answer | {"model": "another-model"}


@choice_fault("retry")
def aborted(choice):
    """The server was asked to end, and ended the completion."""
    return {"text": "", "finish_reason": "abort"}


@choice_fault("retry", "text")
def null_text(choice):
    """No text."""
    return {"text": None}


# --- log-probabilities


def logprobs_fault(expected: Expected) -> Callable[[Change], Change]:
    """Register a fault of likelihoods: the decorated function returns what differs in the log-probabilities."""

    def registered(change: Change) -> Change:
        def changed(choice: Json) -> Json:
            given = choice["logprobs"]
            return {"logprobs": given and given | change(given)}

        changed.__name__ = change.__name__
        choice_fault(expected, "likelihoods")(changed)
        return change

    return registered


@choice_fault("refuse", "likelihoods")
def missing_logprobs(choice):
    """The server does not compute log-probabilities."""
    return {"logprobs": None}


@request_fault("refuse", "likelihoods")
def echo_ignored(asked):
    """Only the log-probabilities of generated tokens."""
    return {"echo": False, "max_tokens": max(1, asked.get("max_tokens", 1))}


@logprobs_fault("retry")
def too_few_logprobs(given):
    """The last log-probability is missing."""
    return {name: values[:-1] for name, values in given.items()}


@logprobs_fault("retry")
def too_many_logprobs(given):
    """The last log-probability twice."""
    return {name: [*values, values[-1]] for name, values in given.items()}


@logprobs_fault("retry")
def null_logprobs(given):
    """The log-probabilities are null."""
    return {"token_logprobs": [None] * len(given["token_logprobs"])}


@logprobs_fault("retry")
def logprobs_not_a_number(given):
    """The log-probabilities are NaN, which Python's json writes and reads."""
    return {"token_logprobs": [math.nan] * len(given["token_logprobs"])}


@logprobs_fault("parity")
def shifted_logprobs(given):
    """The log-probability of each token is given to the token before it."""
    values = given["token_logprobs"]
    return {"token_logprobs": [*values[1:], values[-1]]}


# --- right in form, but of another request or model


@request_fault("parity")
def prompt_begins_with_one_more_token(asked):
    """The first token twice, as when a tokenizer puts its own in front of a prompt that has one."""
    return {"prompt": each_prompt(asked, lambda ids: ids[:1] + ids)}


@request_fault("parity")
def prompt_without_its_first_token(asked):
    """The token of the beginning is missing."""
    return {"prompt": each_prompt(asked, lambda ids: ids[1:])}


@request_fault("parity")
def prompt_cut_on_the_left(asked):
    """Only the second half of each prompt is read."""
    return {"prompt": each_prompt(asked, lambda ids: ids[len(ids) // 2 :])}


@fault("parity")
def another_template(handler):
    """The prompt is put into the template of a chat."""
    tokenizer = handler.owner.completer.tokenizer

    def templated(ids: list[int]) -> list[int]:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return tokenizer(f"### Instruction:\n{text}\n\n### Response:\n")["input_ids"]

    handler.send_completion(handler.asked | {"prompt": each_prompt(handler.asked, templated)})


@fault("parity")
def another_models_weights(handler):
    """The answer of the server's second model, under the name of the first."""
    handler.send_completion(handler.asked, completer=handler.owner.other)


@request_fault("parity", "text")
def stop_texts_ignored(asked):
    """The completion goes on after a stop text, up to the maximal length."""
    return {"stop": None}


@request_fault("parity", "text")
def greedy_ignored(asked):
    """The text is sampled."""
    return {"temperature": 10.0, "seed": 1}


@request_fault("parity", "text")
def repetition_penalised(asked):
    """Tokens that are in the prompt become unlikely."""
    return {"repetition_penalty": 5.0}


@request_fault("parity", "text")
def half_the_length(asked):
    """The server has its own limit of new tokens."""
    return {"max_tokens": max(1, asked.get("max_tokens", 16) // 2)}


@choice_fault("parity", "text")
def ends_early(choice):
    """The completion ends at a text that is not a stop text of the request."""
    return {"text": choice["text"][: len(choice["text"]) // 2], "finish_reason": "stop"}


@choice_fault("parity", "text")
def stripped_text(choice):
    """Spaces at both ends of the text are removed."""
    return {"text": choice["text"].strip()}


def each_prompt(asked: Json, change: Callable[[list[int]], list[int]]) -> Any:
    """Return the token ids of the request's prompt, or of each of its prompts, changed."""
    given = asked["prompt"]
    return change(given) if isinstance(given[0], int) else [change(ids) for ids in given]
