"""The size of a step along a known direction, by a few evaluations of the loss."""

import math
from collections.abc import Callable

FARTHEST = 6  # powers of 4 from the first guess, up or down


def search_multiple(loss_at: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The multiple of the first guess with the least loss, among powers of 2; and every loss that was looked at.

    From 1 it goes by factors of 4 the way the loss falls, until it rises, and then looks at 2 and 1/2 of the best:
    5 evaluations where the guess is good. A loss that is not finite counts as infinite. Of equal losses the smallest
    multiple is taken. Raises ValueError: no loss is finite.
    """
    losses: dict[float, float] = {}

    def loss(multiple: float) -> float:
        if multiple not in losses:
            losses[multiple] = loss_at(multiple)
        return losses[multiple] if math.isfinite(losses[multiple]) else math.inf

    def least(*multiples: float) -> float:
        return min(sorted(multiples), key=loss)

    best = least(1.0, 4.0, 0.25)
    factor = best
    while factor != 1.0 and 4.0**-FARTHEST < best < 4.0**FARTHEST and least(best, best * factor) != best:
        best *= factor
    best = least(best, best * 2, best / 2)
    if not math.isfinite(losses[best]):
        raise ValueError(f"the loss is not finite at any of the {len(losses)} scales that init.scale=search tried")
    return best, losses
