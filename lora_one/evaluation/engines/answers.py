"""Read the answers of a completions API, and refuse what another prompt, model or length has given."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

from lora_one.errors import RunError
from lora_one.evaluation.decoding import Completion, Ending, before
from lora_one.evaluation.engines.connection import Unusable


def choice_in(body: Any, prompt: Sequence[int], model: str) -> dict[str, Any]:
    """Return the one choice of an answer.

    Raises Unusable: another number of choices; RunError: the server has used another prompt or model.
    """
    if not isinstance(body["choices"], list) or len(body["choices"]) != 1:
        raise Unusable(f"{len(body['choices'])} choices instead of 1")
    (choice,) = body["choices"]
    if body.get("model", model) != model:
        raise RunError(f"the server answers with the model {body['model']} instead of {model}: check its configuration")
    ids = choice.get("prompt_token_ids")
    used = (body.get("usage") or {}).get("prompt_tokens") if ids is None else len(ids)
    if (used is not None and used != len(prompt)) or (ids is not None and ids != list(prompt)):
        raise RunError(
            f"the server has read another prompt ({used} tokens) than the {len(prompt)} tokens that were sent: it adds "
            "or cuts tokens (BOS, a template, its context), so its results would be others; turn that off"
        )
    return choice


def completion_in(body: Any, prompt: Sequence[int], model: str, ending: Ending, room: int) -> Completion:
    """Return the completion of an answer, decoded here if the server returns its tokens.

    room: the number of new tokens that were asked for.
    Raises Unusable: the server has ended it early, or its text is missing; RunError: as ``choice_in``.
    """
    choice = choice_in(body, prompt, model)
    text, tokens, reason = choice["text"], choice.get("token_ids"), choice["finish_reason"]
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise Unusable(f"a completion {text!r:.40} that ended by {reason!r}")
    new = (body.get("usage") or {}).get("completion_tokens") if tokens is None else len(tokens)
    if new is not None and (new > room or (reason == "length" and new < room)):
        raise Unusable(f"{new} new tokens, ended by {reason}, where {room} were asked for")
    if tokens is not None:
        found = ending.completion(tokens, room)
        if reason == "stop" and not ending.reached(tokens):
            raise Unusable(f"{new} new tokens, ended by a token or text that ends nothing here")
        return found
    limited = room if room < ending.decoding.max_new_tokens else None
    return Completion(before(text, ending.decoding.stop), room=limited, cut_off=reason == "length")


def finite(value: Any) -> float:
    """Return a log-probability as a number. Raises Unusable: it is missing or not finite."""
    if not isinstance(value, int | float) or not isfinite(value):
        raise Unusable(f"the log-probability {value!r}")
    return float(value)
