"""The two ways a run can stop with one line instead of a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """What was asked for cannot be done as asked; the message names value, rule and way out. Exit code 2."""


class RunError(RuntimeError):
    """The run was well asked for and failed on the way. Exit code 1."""


def nearest(value: str, valid: Iterable[str]) -> str:
    """Say which names are valid, the nearest first: "did you mean a? valid: a, b, c"."""
    names = sorted(str(name) for name in valid)
    close = get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}valid: {', '.join(names) or 'none yet'}"
