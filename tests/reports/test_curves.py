"""curves.png: title, the points before training, and a logarithmic axis where the losses span more than a decade."""

import pytest
from matplotlib.figure import Figure

from lora_one.reports.curves import plot_run

LINES = [
    {"step": 0, "eval_loss": 2.0, "eval_accuracy": 0.25},
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 1.0, "eval_loss": 1.5, "eval_accuracy": 0.5},
]


@pytest.fixture
def plotted(monkeypatch, tmp_path):
    """Returns the figure of a plot, once it is saved."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))

    def plot(lines, **options):
        plot_run(lines, tmp_path / "curves.png", "LoRA-One, seed 7", **options)
        assert (tmp_path / "curves.png").stat().st_size > 1000
        return figures[-1]

    return plot


def points(axis):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.lines}


def test_both_axes_mark_the_model_before_training(plotted):
    figure = plotted(LINES, pretrained={"eval_loss": 4.0, "eval_accuracy": 0.0}, accuracy_name="exact match")
    loss, accuracy = figure.axes
    assert figure.get_suptitle() == "LoRA-One, seed 7"
    assert points(loss)["pretrained"] == [(0, 4.0)] and points(accuracy)["pretrained"] == [(0, 0.0)]
    assert points(loss)["after the initialisation"] == [(0, 2.0)]
    assert points(accuracy)["after the initialisation"] == [(0, 25.0)]
    assert points(loss)["training"] == [(1, 3.0), (2, 1.0)]
    assert accuracy.get_ylabel() == "exact match (%)"


@pytest.mark.parametrize(
    ("last", "pretrained", "scale"),
    [(1.0, 4.0, "linear"), (0.1, 4.0, "log"), (1.0, 40.0, "log"), (0.0, 4.0, "linear")],
)
def test_the_loss_axis_is_logarithmic_beyond_a_decade(plotted, last, pretrained, scale):
    figure = plotted([*LINES, {"step": 3, "loss": last}], pretrained={"eval_loss": pretrained})
    assert figure.axes[0].get_yscale() == scale


def test_without_accuracy_and_without_validation_there_is_one_axis(plotted):
    (axis,) = plotted([{"step": 1, "loss": 3.0}]).axes
    assert points(axis)["training"] == [(1, 3.0)] and "after the initialisation" not in points(axis)
