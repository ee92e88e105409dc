"""The figures of a report, as matplotlib figures that read well on light and on dark paper, and as SVG and PNG.

Text and axes have the colour INK, which a page replaces by that of its own text.
"""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite, log
from textwrap import fill
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#6e7781"
# Okabe and Ito's palette without black and yellow, which one of the two papers swallows; then the same, dashed
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6bb1")
MARKERS = "osD^vPX"
Looks = Mapping[str, Mapping[str, str]]
LABELS = 7  # of the learning-rate axis, at most, and one
UNNAMED = ("_child", "_nolegend_")  # matplotlib's own labels
LEGEND = 80  # characters in a line of the legend, about
LINES, LINE = 6, 0.17  # of the legend: as many as the heights of figures have room for; inches of each
WIDTH = 5.2  # inches; a phone shows 9-point text of this width at about its size
SETTINGS = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "text.parse_math": False,  # a name with $ is a name
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and read aloud
    "svg.hashsalt": "lora-one",  # ids depend on the content alone
}


@dataclass(frozen=True)
class Drawing:
    """A figure with its name (that of its files) and a caption."""

    name: str
    caption: str
    figure: "Figure"

    def svg(self) -> str:
        """Return the figure as an SVG element without the date."""
        text = io.StringIO()
        with styled():
            self.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return text.getvalue()[text.getvalue().index("<svg") :]

    def inline(self) -> str:
        """Return the SVG for a page with others: ids begin with its name, text has the colour of the page's text."""
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", self.svg())
        return text.replace(INK, "currentColor")

    def png(self) -> bytes:
        content = io.BytesIO()
        with styled():
            self.figure.savefig(content, format="png", dpi=200, facecolor="white", metadata={"Software": None})
        return content.getvalue()


@contextmanager
def styled():
    """Use the settings of this file within the block."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        yield


def empty(height: float, columns: int = 1) -> tuple["Figure", Sequence["Axes"]]:
    """Return a figure with axes side by side; height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(1, columns, squeeze=False)[0]


def looks_of(methods: Sequence[str]) -> Looks:
    """Return colour, marker and line of each method, the same in every figure of a report."""
    number = len(COLORS)
    return {
        method: {
            "color": COLORS[place % number],
            "marker": MARKERS[place % number],
            "linestyle": ("-", "--", ":")[place // number % 3],
        }
        for place, method in enumerate(methods)
    }


def legend(figure: "Figure", axes: "Axes") -> None:
    """Put the methods below the axes, in as many columns as their names leave room for; a long list adds height."""
    # not matplotlib's own list, which leaves out names with a leading underscore
    drawn = [*axes.containers, *(line for line in axes.get_lines() if not line.get_label().startswith(UNNAMED))]
    handles, labels = drawn, [one.get_label() for one in drawn]
    columns = min(3, max(1, LEGEND // (6 + max(map(len, labels), default=0))))
    further = max(0, -(-len(labels) // columns) - LINES)
    figure.set_figheight(figure.get_figheight() + LINE * further)
    with styled():
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


@dataclass(frozen=True)
class Difference:
    """A row of a forest plot, in the printed unit: the differences of the seeds, their mean, its interval if any."""

    method: str
    seeds: Sequence[float]
    mean: float
    interval: tuple[float, float] | None


def forest(rows: Sequence[Difference], baseline: str, unit: str, looks: Looks) -> "Figure":
    """Plot the paired differences to the baseline: a dot for each seed, and the mean with its 95 % interval."""
    figure, (axes,) = empty(0.9 + 0.33 * len(rows))
    for place, row in enumerate(reversed(rows)):
        style = looks[row.method]
        low, high = row.interval or (row.mean, row.mean)
        axes.plot([low, high], [place, place], color=style["color"], linewidth=2)
        axes.plot(row.seeds, [place] * len(row.seeds), ".", color=style["color"], alpha=0.5, markersize=5)
        axes.plot(row.mean, place, marker=style["marker"], color=style["color"], markersize=6)
    axes.axvline(0, color=INK, linewidth=1)
    with styled():  # new labels are made here
        axes.set_yticks(range(len(rows)), [fill(row.method, 28) for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"difference to {baseline} ({unit})")
    return figure


@dataclass(frozen=True)
class Tuning:
    """A method's learning rates, ascending, with their validation losses; chosen: its place, if there is one.

    at_end: the chosen one is the lowest or highest of those tried, the failed ones included.
    """

    method: str
    rates: Sequence[float]
    losses: Sequence[float]
    chosen: int | None
    at_end: bool = False


def learning_rates(curves: Sequence[Tuning], looks: Looks) -> "Figure":
    """Plot the validation loss of every learning rate; a ring marks the chosen one, with a bar if it is at an end."""
    figure, (axes,) = empty(3.6)
    for curve in curves:
        style = looks[curve.method]
        axes.plot(curve.rates, curve.losses, label=curve.method, markersize=4, linewidth=1.2, **style)
        if curve.chosen is not None:
            for marker in ("o", "|") if curve.at_end else ("o",):
                mark = {"marker": marker, "markersize": 12 if marker == "o" else 20, "markerfacecolor": "none"}
                place = curve.rates[curve.chosen], curve.losses[curve.chosen]
                axes.plot(*place, linestyle="", markeredgecolor=style["color"], **mark)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats)")
    shown = labelled([rate for curve in curves for rate in curve.rates])
    axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
    axes.minorticks_off()
    readable_losses(axes, [loss for curve in curves for loss in curve.losses])
    legend(figure, axes)
    return figure


def labelled(rates: Sequence[float]) -> list[float]:
    """Return those of the rates whose labels do not overlap on a logarithmic axis.

    >>> labelled([1e-3, 1e-2, 1e-3, 1.05e-2, 1e-1])
    [0.001, 0.01, 0.1]
    """
    shown: list[float] = []
    distance = log(max(rates) / min(rates)) / LABELS
    for rate in sorted(set(rates)):
        if not shown or log(rate / shown[-1]) >= distance:
            shown.append(rate)
    return shown


def readable_losses(axes: "Axes", losses: Sequence[float]) -> None:
    """End the axis at three times the spread of the better half, so that a diverged run does not flatten the others."""
    values = sorted(loss for loss in losses if isfinite(loss))
    if len(values) < 4:
        return
    low, middle = values[0], values[len(values) // 2]
    top = low + 3 * (middle - low)
    if middle > low and values[-1] > top:
        margin = 0.05 * (top - low)
        axes.set_ylim(low - margin, top)
        axes.set_title("higher losses lie above the axis", fontsize=8, loc="right")


@dataclass(frozen=True)
class Course:
    """A method's means over the seeds: epoch -> validation loss, and epoch -> figure, {} if none was measured."""

    method: str
    losses: Mapping[float, float]
    figures: Mapping[float, float] = field(default_factory=dict)


def epochs(curves: Sequence[Course], figure_name: str, looks: Looks) -> "Figure":
    """Plot the validation loss and, if measured, a figure over the epochs. figure_name: with its unit."""
    measured = any(curve.figures for curve in curves)
    figure, axes = empty(3.4, 2 if measured else 1)
    for curve in curves:
        style = {**looks[curve.method], "markersize": 3.5, "linewidth": 1.2}
        axes[0].plot(list(curve.losses), list(curve.losses.values()), label=curve.method, **style)
        if curve.figures:
            axes[1].plot(list(curve.figures), list(curve.figures.values()), **style)
    axes[0].set(xlabel="epoch", ylabel="validation loss (nats)")
    if len(curves) > 1:
        readable_losses(axes[0], [loss for curve in curves for loss in curve.losses.values()])
    if measured:
        axes[1].set(xlabel="epoch", ylabel=figure_name)
    legend(figure, axes[0])
    return figure


def spectra(curves: Mapping[str, Sequence[float]], looks: Looks) -> "Figure":
    """Plot the leading singular values of each method, on a logarithmic axis."""
    figure, (axes,) = empty(3.0)
    for method, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=method, markersize=3.5, linewidth=1.2, **looks[method])
    axes.set(yscale="log", xlabel="number of the singular value", ylabel="singular value of B A")
    axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's own labels of powers of ten are formulas
    axes.yaxis.set_minor_formatter("")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, axes)
    return figure


@dataclass(frozen=True)
class Cost:
    """A method's seconds of initialisation and training, and its figure with the standard deviation over seeds."""

    method: str
    seconds: float
    value: float
    sd: float


def pareto(points: Sequence[Cost], figure_name: str, looks: Looks, *, higher: bool) -> "Figure":
    """Plot the figure over the seconds; a line joins the methods that no other one beats in both."""
    drawn, (axes,) = empty(3.4)
    for point in points:
        style = {**looks[point.method], "linestyle": ""}
        axes.errorbar(point.seconds, point.value, yerr=point.sd, label=point.method, capsize=2, **style)
    front = unbeaten(points, higher=higher)
    axes.plot([p.seconds for p in front], [p.value for p in front], color=INK, linewidth=1, linestyle=":")
    axes.set(xlabel="initialisation and training (s)", ylabel=figure_name)
    legend(drawn, axes)
    return drawn


def unbeaten(points: Sequence[Cost], *, higher: bool) -> list[Cost]:
    """Return the points that are better than every faster one, from the fastest on.

    >>> found = unbeaten([Cost("a", 3, 0.9, 0), Cost("b", 1, 0.5, 0), Cost("c", 2, 0.4, 0)], higher=True)
    >>> [point.method for point in found]
    ['b', 'a']
    """
    front: list[Cost] = []
    for point in sorted(points, key=lambda point: (point.seconds, -point.value if higher else point.value)):
        if not front or (point.value > front[-1].value if higher else point.value < front[-1].value):
            front.append(point)
    return front
