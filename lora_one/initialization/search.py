"""Line search: choose the size of a step in a given direction with a few evaluations of the loss."""

import math
from collections.abc import Callable

from lora_one.progress import progress

EVALUATIONS = 4
FIRST = 1.25  # first-order decrease at the first size tried, as a multiple of the loss
UP, DOWN = 1.4, 2.0  # factors to the next size if the lowest loss is at the largest, or the smallest, size tried
ENOUGH = 1e-3  # smallest relative gain for another evaluation
RESCUE = 16.0  # largest factor between a size and the next smaller one
MAX_RESCUES = 4  # maximal number of further evaluations if no size has lowered the loss


def line_search(
    loss_at: Callable[[float], float], loss: float, decrease: float, evaluations: int = EVALUATIONS
) -> tuple[float, dict[float, float]]:
    """Return the size with the lowest loss among those tried, and the loss at every size tried.

    The first trial follows from the slope at zero, the second from the parabola through the loss and the slope at
    zero and the first trial. Then, with x = log(size): if the best trial lies between two others, the next one is the
    vertex of the parabola through the three; else it is a constant factor beyond the best. A loss that is not finite
    counts as infinite. While no trial is below ``loss``, up to MAX_RESCUES smaller ones follow.

    loss: loss at size 0.  decrease: -d loss / d size at 0 (to first order, the loss falls by decrease x size).
    evaluations: maximal number of evaluations if one of them is below ``loss``.
    Raises ValueError: no loss is finite.
    """
    losses: dict[float, float] = {}
    size: float | None = FIRST * loss / decrease if decrease > 0 else 1.0
    with progress("search for the scale", evaluations, "losses") as shown:
        while size is not None:
            losses[size] = loss_at(size)
            shown.advance()
            size = next_size(losses, loss, decrease, evaluations)
            size = None if size in losses else size
    finite = {tried: value for tried, value in losses.items() if math.isfinite(value)}
    if not finite:
        raise ValueError(f"the loss is not finite at any of the {len(losses)} scales that init.scale=search tried")
    return min(sorted(finite), key=finite.__getitem__), losses


def next_size(losses: dict[float, float], loss: float, decrease: float, evaluations: int) -> float | None:
    """Return the next size to try; None: the search ends."""
    sizes = sorted(losses)
    values = [losses[size] if math.isfinite(losses[size]) else math.inf for size in sizes]
    place = values.index(min(values))
    best, least = sizes[place], values[place]
    if least >= loss:
        return smaller(sizes[0], values[0], loss, decrease) if len(sizes) < evaluations + MAX_RESCUES else None
    if len(sizes) >= evaluations:
        return None
    if len(sizes) == 1:
        return min(best * UP, max(best / RESCUE, vertex_from_slope(best, least, loss, decrease)))
    if place == len(sizes) - 1:
        return best * UP
    if place == 0:
        return best / DOWN
    around = slice(place - 1, place + 2)
    vertex, gain = parabola(sizes[around], values[around])
    return vertex if gain > ENOUGH * least else None


def smaller(size: float, value: float, loss: float, decrease: float) -> float:
    """Return a size below one that did not lower the loss: the parabola's vertex, or a constant factor down."""
    vertex = vertex_from_slope(size, value, loss, decrease) if math.isfinite(value) else 0.0
    return max(size / RESCUE, min(vertex, size / DOWN))


def vertex_from_slope(size: float, value: float, loss: float, decrease: float) -> float:
    """Return the minimiser of the parabola through (0, loss) with slope -decrease and through (size, value)."""
    curvature = (value - loss + decrease * size) / size**2
    return decrease / (2 * curvature) if curvature > 0 else math.inf


def parabola(sizes: list[float], values: list[float]) -> tuple[float, float]:
    """Return the vertex of the parabola in log(size) through three points, the middle one the lowest, and its gain.

    If a value is infinite, return the middle (in log(size)) of the first two points and an infinite gain.
    """
    left, middle, right = (math.log(size) for size in sizes)
    if not all(map(math.isfinite, values)):
        return math.exp((left + middle) / 2), math.inf
    down, up = (values[0] - values[1]) / (middle - left), (values[2] - values[1]) / (right - middle)
    bend = (down + up) / (right - left)
    slope = up - bend * (right - middle)  # at the middle
    return math.exp(middle - slope / (2 * bend)), slope**2 / (4 * bend)
