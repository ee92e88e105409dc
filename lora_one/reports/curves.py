"""Plot one run: loss and, if measured, accuracy over optimizer steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_run(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Plot the lines of metrics.jsonl to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    accuracy = series("eval_accuracy")
    figure = Figure(figsize=(10, 4) if accuracy[0] else (6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if accuracy[0] else 1, squeeze=False)[0]
    axes[0].plot(*series("loss"), linewidth=1, alpha=0.7, label="training")
    axes[0].plot(*series("eval_loss"), marker="o", label="validation")
    axes[0].set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes[0].legend()
    if accuracy[0]:
        axes[1].plot(accuracy[0], [100 * value for value in accuracy[1]], marker="o", color="C2")
        axes[1].set(xlabel="optimizer step", ylabel="exact match (%)", ylim=(0, 100))
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
