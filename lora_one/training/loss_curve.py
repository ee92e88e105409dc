"""The first and the last loss of a run, for run.json."""

from collections.abc import Sequence
from statistics import mean

LOSS_WINDOW = 10  # the first and the last loss are means over at most this number of logged losses


def first_and_last(losses: Sequence[float]) -> dict[str, float | None]:
    """Return {first_loss, last_loss}: the means of the first and of the last logged losses of a run.

    Each is over LOSS_WINDOW losses, or over half of all losses if there are fewer than two windows, so the two means
    share no loss. A single loss is both; without losses both are None.
    """
    window = min(LOSS_WINDOW, max(1, len(losses) // 2))
    return {
        "first_loss": mean(losses[:window]) if losses else None,
        "last_loss": mean(losses[-window:]) if losses else None,
    }
