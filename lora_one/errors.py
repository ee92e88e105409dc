"""The two errors that are printed as one line instead of a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """The request is not valid; the message names the value, the rule and what to do. Exit code 2."""


class RunError(RuntimeError):
    """The request was valid, but the run failed. Exit code 1."""


def nearest(value: str, valid: Iterable[str]) -> str:
    """Return a hint that lists the valid names, the closest first: "did you mean a? valid: a, b, c"."""
    names = sorted(str(name) for name in valid)
    close = get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}valid: {', '.join(names) or 'none yet'}"
