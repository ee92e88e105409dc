"""Faults in the content of a completion server's answers; see completion_faults.py.

Those that answer another request than was sent are in completion_wrong_requests.py.
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


@fault("retry")
def wrong_encoding(handler):
    """Said to be compressed, but it is not."""
    handler.send(200, {}, {"Content-Encoding": "gzip"})


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


# --- texts that are not what was generated, without its tokens


@choice_fault("parity", "text")
def ends_early(choice):
    """The completion ends at a text that is not a stop text of the request."""
    return {"text": choice["text"][: len(choice["text"]) // 2], "finish_reason": "stop", "token_ids": None}


@choice_fault("parity", "text")
def stripped_text(choice):
    """Spaces at both ends of the text are removed."""
    return {"text": choice["text"].strip(), "token_ids": None}
