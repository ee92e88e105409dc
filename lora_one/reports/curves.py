"""Plot one run: loss and, if measured, accuracy over optimizer steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DECADE = 10.0  # ratio of the largest to the smallest loss from which the axis is logarithmic


def plot_run(
    lines: Sequence[dict[str, Any]],
    path: Path,
    title: str,
    *,
    pretrained: Mapping[str, float] | None = None,
    accuracy_name: str = "accuracy",
) -> None:
    """Plot the lines of metrics.jsonl to a PNG.

    A validation at step 0 is marked as the one after the initialisation.  pretrained: eval_loss and, if measured,
    eval_accuracy of the base model.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    base = pretrained or {}
    accuracy = series(lines, "eval_accuracy")
    columns = 2 if accuracy[0] else 1
    figure = Figure(figsize=(10, 4.2) if columns == 2 else (6.4, 4.2))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    left = 0.08 if columns == 2 else 0.125
    figure.subplots_adjust(left=left, right=0.98, bottom=0.12, top=0.9, wspace=0.2)  # a fitted layout draws it twice
    trained = series(lines, "loss")
    if trained[0]:
        axes[0].plot(*trained, linewidth=1, alpha=0.7, label="training")
    draw_validation(axes[0], series(lines, "eval_loss"), base.get("eval_loss"), "C1")
    scale = scale_of(lines, base)
    axes[0].set(xlabel="optimizer step", ylabel="loss (nats per token)", yscale=scale)
    if scale == "linear":
        axes[0].ticklabel_format(axis="y", scilimits=(-2, 4))  # short labels
    if columns == 2:
        share = base.get("eval_accuracy")
        percent = (accuracy[0], [100 * value for value in accuracy[1]])
        draw_validation(axes[1], percent, None if share is None else 100 * share, "C2")
        axes[1].set(xlabel="optimizer step", ylabel=f"{accuracy_name} (%)", ylim=(-3, 103))
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and the values of a metric."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def draw_validation(axis: Any, points: tuple[list[int], list[float]], pretrained: float | None, color: str) -> None:
    """Draw a metric of the validation, with marks for the base model and for the model after the initialisation."""
    if points[0]:
        axis.plot(*points, marker=".", color=color, label="validation")
    if pretrained is not None:
        axis.plot([0], [pretrained], marker="x", markersize=8, linestyle="", color="black", label="pretrained")
    if points[0][:1] == [0]:
        mark = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgecolor": "black"}
        axis.plot([0], points[1][:1], linestyle="", label="after the initialisation", **mark)


def scale_of(lines: Sequence[Mapping[str, Any]], pretrained: Mapping[str, float]) -> str:
    """Return ``log`` if all losses are positive and they span more than a decade, otherwise ``linear``."""
    losses = [value for name in ("loss", "eval_loss") for value in series([*lines, {"step": 0, **pretrained}], name)[1]]
    return "log" if losses and min(losses) > 0 and max(losses) / min(losses) > DECADE else "linear"
