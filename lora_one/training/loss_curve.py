"""First and last loss of a run, as run.json gives them."""

from collections.abc import Sequence
from statistics import mean

LOSS_WINDOW = 10  # the first and the last loss of a run are means over at most so many logged losses


def first_and_last(losses: Sequence[float]) -> dict[str, float | None]:
    """Return {first_loss, last_loss}: the means of the first and of the last logged losses of a run.

    Each is over LOSS_WINDOW losses, or over half of them where there are fewer than two windows, so that no loss is
    in both. None without losses; a single loss is both.
    """
    window = min(LOSS_WINDOW, max(1, len(losses) // 2))
    return {
        "first_loss": mean(losses[:window]) if losses else None,
        "last_loss": mean(losses[-window:]) if losses else None,
    }
