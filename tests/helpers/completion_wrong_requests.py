"""Faults of a completion server that answers another request than was sent, or with another model.

The answers have the right form. A client can see that another prompt was read only if the answer says how many tokens,
or which ones, the prompt had; the faults whose names end in _unseen answer without that.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.helpers.completion_faults import Expected, Reads, fault

if TYPE_CHECKING:
    from tests.helpers.completion_server import Handler

Json = dict[str, Any]
Change = Callable[[Json], Json]


def request_fault(expected: Expected, reads: Reads = "both") -> Callable[[Change], Change]:
    """Register a fault: the decorated function returns what the server reads differently in the request."""

    def registered(change: Change) -> Change:
        def act(handler: "Handler") -> None:
            handler.send_completion(handler.asked | change(handler.asked))

        act.__name__ = change.__name__
        fault(expected, reads)(act)
        return change

    return registered


def without_prompt(answer: Json) -> Json:
    """Return an answer that does not say which prompt was read."""
    choices = [choice | {"prompt_token_ids": None} for choice in answer["choices"]]
    return answer | {"usage": None, "choices": choices}


def prompt_fault(change: Callable[[list[int], Any], list[int]]) -> None:
    """Register two faults: the decorated function of (token ids, tokenizer) returns the prompt that is read."""

    def other(handler: "Handler") -> Json:
        given, tokenizer = handler.asked["prompt"], handler.owner.completer.tokenizer
        read = change(given, tokenizer) if isinstance(given[0], int) else [change(ids, tokenizer) for ids in given]
        return handler.asked | {"prompt": read}

    def act(handler: "Handler") -> None:
        handler.send_completion(other(handler))

    def unseen(handler: "Handler") -> None:
        handler.send_completion(other(handler), without_prompt)

    act.__name__, unseen.__name__ = change.__name__, f"{change.__name__}_unseen"
    fault("refuse")(act)
    fault("parity")(unseen)


# --- another prompt


@prompt_fault
def prompt_begins_with_one_more_token(ids, _):
    """The first token twice, as when a tokenizer puts its own in front of a prompt that has one."""
    return ids[:1] + ids


@prompt_fault
def prompt_without_its_first_token(ids, _):
    """The token of the beginning is missing."""
    return ids[1:]


@prompt_fault
def prompt_cut_on_the_left(ids, _):
    """Only the second half is read."""
    return ids[len(ids) // 2 :]


@prompt_fault
def another_template(ids, tokenizer):
    """The prompt is put into the template of a chat."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return tokenizer(f"### Instruction:\n{text}\n\n### Response:\n")["input_ids"]


@fault("parity")
def prompt_with_another_last_token_unseen(handler):
    """As many tokens as were sent, but the last one is another."""
    given = handler.asked["prompt"]
    prompts = [given] if isinstance(given[0], int) else given
    handler.send_completion(handler.asked | {"prompt": [[*ids[:-1], ids[0]] for ids in prompts]}, without_prompt)


# --- another model, or other options


@fault("parity")
def another_models_weights(handler):
    """The answer of the server's second model, under the name of the first."""
    handler.send_completion(handler.asked, completer=handler.owner.other)


@request_fault("refuse", "likelihoods")
def echo_ignored(asked):
    """Only the log-probabilities of generated tokens."""
    return {"echo": False, "max_tokens": max(1, asked.get("max_tokens", 1))}


@request_fault("accept", "text")
def stop_texts_ignored(asked):
    """The completion goes on after a stop text, up to the maximal length; a client can cut it itself."""
    return {"stop": None}


@request_fault("parity", "text")
def greedy_ignored(asked):
    """The text is sampled."""
    return {"temperature": 10.0, "seed": 1}


@request_fault("parity", "text")
def repetition_penalised(asked):
    """Tokens that are in the prompt become unlikely."""
    return {"repetition_penalty": 5.0}


@fault("parity", "text")
def half_the_length(handler):
    """The server has its own limit of new tokens, and does not return them."""
    asked = handler.asked | {"max_tokens": max(1, handler.asked.get("max_tokens", 16) // 2), "return_token_ids": False}
    handler.send_completion(asked)
