"""What the figures show, read from the axes."""

import pytest

from lora_one.reports import figures
from lora_one.reports.figures import Cost, Course, Difference, Drawing, Tuning, looks_of

METHODS = [f"method {number}" for number in range(9)]
LOOKS = looks_of(METHODS)


def lines_of(axes, color):
    return [line for line in axes.get_lines() if line.get_color() == color]


def test_nine_methods_look_different():
    assert len({tuple(look.values()) for look in LOOKS.values()}) == 9


def test_forest_has_interval_seeds_and_mean_of_each_method_and_a_line_at_zero():
    rows = [Difference("method 1", [1.0, 3.0], 2.0, (-1.0, 5.0)), Difference("method 2", [4.0], 4.0, None)]
    (axes,) = figures.forest(rows, "the baseline", "points", LOOKS).axes
    interval, seeds, mean = lines_of(axes, LOOKS["method 1"]["color"])
    assert list(interval.get_xdata()) == [-1, 5] and list(seeds.get_xdata()) == [1, 3] and list(mean.get_xdata()) == [2]
    alone, *_ = lines_of(axes, LOOKS["method 2"]["color"])
    assert list(alone.get_xdata()) == [4, 4], "without an interval no width"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["method 2", "method 1"], "the first one is on top"
    assert any(list(line.get_xdata()) == [0, 0] for line in axes.get_lines())
    assert axes.get_xlabel() == "difference to the baseline (points)"


def test_a_name_with_a_dollar_or_an_underscore_is_a_name():
    """matplotlib takes the one for a formula, and leaves the other out of a legend."""
    names = ["_hidden", r"LoRA-$\foo{$x"]
    looks = looks_of(names)
    drawn = [
        figures.forest([Difference(name, [1.0, 2.0], 1.5, None) for name in names], names[1], "points", looks),
        figures.learning_rates([Tuning(name, [1e-3, 1e-2], [2.0, 1.0], 1) for name in names], looks),
        figures.pareto([Cost(name, 1.0, 2.0, 0.1) for name in names], names[0], looks, higher=True),
    ]
    for place, figure in enumerate(drawn):
        text = Drawing("a", "b", figure).svg()
        assert names[1] in text and (names[0] in text or place == 0)
    for figure in drawn[1:]:
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == names


@pytest.mark.parametrize(("chosen", "markers"), [(1, "o"), (0, "o|"), (2, "o|")])
def test_learning_rates_mark_the_chosen_one_and_an_end_by_a_bar(chosen, markers):
    curve = Tuning("method 3", [1e-4, 1e-3, 1e-2], [3.0, 2.0, 2.5], chosen, at_end="|" in markers)
    axes = figures.learning_rates([curve], LOOKS).axes[0]
    drawn, *marks = axes.get_lines()
    assert list(drawn.get_xdata()) == curve.rates and list(drawn.get_ydata()) == curve.losses
    assert "".join(mark.get_marker() for mark in marks) == markers
    assert all(list(mark.get_xdata()) == [curve.rates[chosen]] for mark in marks)
    assert axes.get_xscale() == "log" and [text.get_text() for text in axes.get_xticklabels()] == [
        "0.0001",
        "0.001",
        "0.01",
    ]


def test_a_diverged_run_does_not_flatten_the_others():
    curve = Tuning("method 0", [1, 2, 3, 4], [1.0, 1.1, 1.2, 900.0], 0)
    axes = figures.learning_rates([curve], LOOKS).axes[0]
    assert 1.2 < axes.get_ylim()[1] < 2 and "above the axis" in axes.get_title(loc="right")


@pytest.mark.filterwarnings("error")
def test_a_long_legend_leaves_room_for_the_axes():
    """As many methods as a report shows, with the names of their folders: more lines than the figure was high."""
    names = [f"LoRA-One-r8-a16-search-lr0.005-{number:08d}" for number in range(21)]
    looks = looks_of(names)
    figure = figures.learning_rates([Tuning(name, [1e-3, 1e-2], [2.0, 1.0], 1) for name in names], looks)
    assert Drawing("a", "b", figure).svg().startswith("<svg")
    assert figure.axes[0].get_window_extent().height > 100


def test_epochs_show_accuracy_only_where_it_was_measured():
    plain = Course("method 0", {0: 2.0, 1: 1.0})
    assert len(figures.epochs([plain], "accuracy", LOOKS).axes) == 1
    drawn = figures.epochs([plain, Course("method 1", {0: 2.0, 1: 1.5}, {0: 40.0, 1: 60.0})], "accuracy", LOOKS)
    losses, shares = drawn.axes
    assert [list(line.get_ydata()) for line in losses.get_lines()] == [[2, 1], [2, 1.5]]
    assert [list(line.get_ydata()) for line in shares.get_lines()] == [[40, 60]]


def test_spectra_are_numbered_from_one_on_a_logarithmic_axis():
    figure = figures.spectra({"method 0": [3.0, 0.1]}, LOOKS)
    axes = figure.axes[0]
    figure.canvas.draw()
    assert {"0.1", "1"} <= {text.get_text() for text in axes.get_yticklabels(which="both")}, "numbers, not formulas"
    assert not any("$" in text.get_text() for text in axes.get_yticklabels(which="both"))
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [1, 2] and list(line.get_ydata()) == [3.0, 0.1] and axes.get_yscale() == "log"


def test_pareto_joins_the_methods_that_no_faster_one_beats():
    points = [Cost("method 0", 3, 0.9, 0.1), Cost("method 1", 1, 0.5, 0), Cost("method 2", 2, 0.4, 0)]
    front = figures.pareto(points, "accuracy", LOOKS, higher=True).axes[0].get_lines()[-1]
    assert list(front.get_xdata()) == [1, 3]
    front = figures.pareto(points, "loss", LOOKS, higher=False).axes[0].get_lines()[-1]
    assert list(front.get_xdata()) == [1, 2]
