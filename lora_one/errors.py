"""The two errors that are printed as one line instead of a traceback."""

import re
import traceback
from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """The request is not valid; the message names the value, the rule and what to do. Exit code 2."""


class RunError(RuntimeError):
    """The request was valid, but the run failed. Exit code 1."""


def reason_of(failure: Exception) -> str:
    """Return an error as text; of a bug, here or in a library, print the traceback, and name its class."""
    if isinstance(failure, UsageError | RunError):
        return str(failure)
    traceback.print_exception(failure)
    return f"{type(failure).__name__}: {failure}"


NO = {"off", "no", "none", "disabled"}  # words of one meaning, none of which is similar to another


def nearest(value: str, valid: Iterable[str]) -> str:
    """Return a hint that lists the valid names, the closest first: "did you mean a? valid: a, b, c"."""
    names = sorted(str(name) for name in valid)
    close = closest(str(value), names)
    hint = f"did you mean {close}? " if close else ""
    return f"{hint}valid: {', '.join(names) or 'none yet'}"


def closest(value: str, names: Iterable[str]) -> str | None:
    """Return the name that is most similar to the value, up to case and punctuation; None: no name is similar.

    >>> closest("LoRAOne", ["lora", "lora_ga", "lora_one"]), closest("off", ["online", "offline", "disabled"])
    ('lora_one', 'disabled')
    """
    plain = {re.sub(r"[\W_]", "", name).lower(): name for name in names}
    if value.lower() in NO and NO & plain.keys():
        return plain[min(NO & plain.keys())]
    found = get_close_matches(re.sub(r"[\W_]", "", value).lower(), plain, n=1, cutoff=0.6)
    return plain[found[0]] if found else None
