"""The sections of a report with curves and costs: learning rates, epochs, time, and what the starts did."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from statistics import mean, stdev

from lora_one.reports import figures
from lora_one.reports.compare import RATE, Point, Run, value_text
from lora_one.reports.figures import Drawing
from lora_one.reports.results import Results, Section


def learning_rates(results: Results) -> Iterator[Section]:
    """Yield the validation loss of every point, and a figure over the learning rates, if the grid has them.

    The figure has the best loss at each rate over the other keys.
    """
    curves = [tuned for method in results.methods if (tuned := tuning(results, method)) is not None]
    ends = {curve.method for curve in curves if curve.at_end}
    tried = [line for method in results.methods for line in points(results, method, at_end=method in ends)]
    if not tried:
        return
    keys = ["learning rate" if key == RATE else key for key in results.keys]
    drawings = []
    if curves:
        caption = "Validation loss of every learning rate. Ring: chosen; with a bar: at an end of those tried."
        caption += " At each rate the best value of the other keys." * (len(keys) > 1)
        drawings = [Drawing("learning-rates", caption, figures.learning_rates(curves, results.looks))]
    title = "Learning rates" if RATE in results.keys else "Points of the grid"
    lines = [["method", *keys, "validation loss", ""], *tried]
    yield Section(title, table=lines, drawings=drawings, long_table=True)


def points(results: Results, method: str, *, at_end: bool) -> list[list[str]]:
    """Return a line for each point of a method's tuning, with the mean loss over the seeds, sorted by learning rate.

    A point at which a run failed is left out, because it cannot be chosen.
    """
    losses: dict[str, list[float]] = {}
    of_text: dict[str, Point] = {}
    for run in results.by_stage.get((method, "tuning"), ()):
        value = inf if run.error is not None or run.validation_loss is None else run.validation_loss
        losses.setdefault(str(run.point), []).append(value)
        of_text[str(run.point)] = run.point
    chosen, lines = results.chosen(method), []
    for text, point in sorted(of_text.items(), key=lambda entry: entry[1].get(RATE, 0)):
        mark = ("chosen, at an end" if at_end else "chosen") if point == chosen else ""
        values = [value_text(point[key]) if key in point else "-" for key in results.keys]
        lines += [[method, *values, f"{mean(losses[text]):.4f}", mark]] if mean(losses[text]) < inf else []
    return lines


def tuning(results: Results, method: str) -> figures.Tuning | None:
    """Return a method's learning rates with the lowest mean loss over the seeds at each; None: it has none."""
    losses: dict[float, dict[str, list[float]]] = {}
    for run in results.by_stage.get((method, "tuning"), ()):
        if RATE in run.point:
            others = str([value for key, value in run.point.items() if key != RATE])
            value = inf if run.error is not None or run.validation_loss is None else run.validation_loss
            losses.setdefault(run.point[RATE], {}).setdefault(others, []).append(value)
    means = {rate: min(map(mean, losses[rate].values())) for rate in sorted(losses)}
    tried = list(means)
    rates = [rate for rate in tried if means[rate] < inf]  # a point at which a run failed is not chosen, nor drawn
    if not rates:
        return None
    row = next(row for row in results.rows if row["method"] == method)
    chosen = rates.index(row[RATE]) if row.get(RATE) in rates else None
    at_end = chosen is not None and row[RATE] in (tried[0], tried[-1])
    return figures.Tuning(method, rates, [means[rate] for rate in rates], chosen, at_end=at_end)


def courses(results: Results) -> Iterator[Section]:
    """Yield loss and a figure over the epochs, means over the seeds of the chosen point.

    The figure is the main evaluation if epochs were kept, otherwise the accuracy of the validation.
    """
    kept = any(results.figure in run.epoch_scores for run in results.runs)
    curves = [course(results, method, kept=kept) for method in results.methods if results.of(method, "final")]
    if all(len(curve.losses) < 2 for curve in curves):
        return
    name = results.titled(results.figure) if kept else "validation accuracy (%)"
    caption = "Validation over the epochs, mean over the seeds; epoch 0 is after the initialisation."
    if kept:
        caption += f" {results.figure}: of the adapters after each epoch."
    drawn = Drawing("epochs", caption, figures.epochs(curves, name, results.looks))
    measured = any(curve.figures for curve in curves)
    digits = results.unit(results.figure).digits if kept else 1
    lines = [["method", "epoch", "validation loss", *[name] * measured]]
    for curve in curves:
        for epoch in sorted({*curve.losses, *curve.figures}):
            loss, value = curve.losses.get(epoch), curve.figures.get(epoch)
            cells = [
                "-" if loss is None else f"{loss:.4f}",
                *["-" if value is None else f"{value:.{digits}f}"] * measured,
            ]
            lines.append([curve.method, f"{epoch:.3g}", *cells])
    yield Section("Over the epochs", table=lines, drawings=[drawn], long_table=True)


def course(results: Results, method: str, *, kept: bool) -> figures.Course:
    """Return the means over the seeds at the epochs that every run of a method has."""
    runs = results.of(method, "final")
    losses = shared_means([{entry["epoch"]: entry["loss"] for entry in run.history} for run in runs])
    if kept:
        scale = results.unit(results.figure).scale
        return figures.Course(
            method, losses, shared_means([scores_by_epoch(run, results.figure) for run in runs], scale)
        )
    shares = [{entry["epoch"]: entry["accuracy"] for entry in run.history} for run in runs]
    return figures.Course(method, losses, shared_means(shares, 100))


def scores_by_epoch(run: Run, figure: str) -> dict[float, float | None]:
    """Return epoch -> an evaluation of a run: of the kept epochs, and of the end of the training."""
    found: dict[float, float | None] = {
        float(epoch): value for epoch, value in run.epoch_scores.get(figure, {}).items()
    }
    last = max((entry["epoch"] for entry in run.history), default=None)
    return found | ({last: run.scores.get(figure, {}).get("value")} if last is not None else {})


def shared_means(values: Sequence[Mapping[float, float | None]], scale: float = 1) -> dict[float, float]:
    """Return epoch -> mean over the runs, of the epochs at which every run has a value."""
    shared = sorted(set.intersection(*(set(found) for found in values))) if values else []
    complete = [epoch for epoch in shared if all(found[epoch] is not None for found in values)]
    return {epoch: scale * mean(found[epoch] for found in values) for epoch in complete}


def costs(results: Results) -> Iterator[Section]:
    """Yield parameters, seconds and memory, and the main figure over the seconds."""
    lines = [["method", "trainable parameters", "initialisation (s)", "training (s)", "peak memory (GiB)"]]
    points = []
    unit = results.unit(results.figure)
    for method in results.methods:
        done = results.of(method, "final")
        if not done or any(run.train_seconds is None for run in done):
            continue
        lines.append([method, f"{done[0].trainable_parameters:,}", *(average(done, name, 1) for name in SECONDS)])
        lines[-1].append(average(done, "peak_memory_bytes", 2**30))
        values = results.values(method, results.figure)
        if values:
            seconds = mean(run.init_seconds + run.train_seconds for run in done)
            spread = unit.scale * stdev(values) if len(values) > 1 else 0.0
            points.append(figures.Cost(method, seconds, unit.scale * mean(values), spread))
    if len(lines) == 1:
        return
    name = results.titled(results.figure)
    caption = f"{results.figure} over the time of a run; bars: standard deviation over seeds; line: unbeaten methods."
    text = "Mean over the seeds, on the machine below. Not every method ran at the same time: a difference may also "
    text += "come from other work on the machine."
    ratio = unevenness(results)
    if ratio > UNEVEN:
        text += f" The times of one method's runs, of the same steps, differ by up to {ratio:.1f} x, because of other "
        text += "work on the machine or of runs that were resumed: methods cannot be compared by these times."
        points = []
    drawn = (
        [Drawing("cost", caption, figures.pareto(points, name, results.looks, higher=unit.higher))]
        if len(points) > 1
        else []
    )
    yield Section("Cost", [text], table=lines, drawings=drawn)


UNEVEN = 1.5  # ratio of the times of runs with the same steps, from which they say more about the machine


def unevenness(results: Results) -> float:
    """Return the largest ratio between the training times of two final runs of one method, per step."""
    ratios = [1.0]
    for method in results.methods:
        done = [run for run in results.of(method, "final") if run.train_seconds and run.steps]
        times = [run.train_seconds / run.steps for run in done]
        ratios += [max(times) / min(times)] if times else []
    return max(ratios)


SECONDS = ("init_seconds", "train_seconds")


def average(runs: Sequence[Run], name: str, unit: float) -> str:
    """Return the mean of a figure over the runs that have it, in a unit."""
    values = [value / unit for run in runs if (value := getattr(run, name)) is not None]
    return f"{mean(values):.3g}" if values else "-"


MECHANISM = {  # figure of a start -> its title and its form
    "captured_energy": ("captured energy", "{:.3f}"),
    "shift": ("largest ||s B A|| / ||W||", "{:.2e}"),
    "gamma": ("gamma of each seed", "{:.3g}"),
    "loss_before": ("loss on its examples before", "{:.4f}"),
    "loss_after": ("after", "{:.4f}"),
    "B_angles": ("angle of B to the gradient after training", "{:.1f} degrees"),
    "A_angles": ("angle of A", "{:.1f} degrees"),
}
OF_EACH_SEED = ("gamma",)  # a search can end a thousand times apart: the mean of 25,400 and 22 is a start of neither


def mechanism(results: Results) -> Iterator[Section]:
    """Yield what the starts did, and the angles and spectra of the trained adapters."""
    final = {method: sorted(results.of(method, "final"), key=lambda run: run.seed) for method in results.methods}
    found = {method: [run.start | run.adapters for run in runs] for method, runs in final.items()}
    names = [name for name in MECHANISM if any(name in one for each in found.values() for one in each)]
    lines = [["method", *(MECHANISM[name][0] for name in names)]]
    for method, each in found.items():
        values = {name: [one[name] for one in each if name in one] for name in names}
        if any(values.values()):
            lines.append([method, *(start_figure(name, values[name]) for name in names)])
    text = [
        "Captured energy: share of the gradient's squared norm in its leading singular values, mean over layers.",
        "Columns are means over the seeds, except where a value of each seed is given, in the order of the seeds.",
    ]
    spectra = {method: [one["spectrum"] for one in each if "spectrum" in one] for method, each in found.items()}
    means = {method: list(map(mean, zip(*each, strict=False))) for method, each in spectra.items() if each}
    caption = "Leading singular values of B A after training, means over layers and seeds."
    drawn = [Drawing("spectra", caption, figures.spectra(means, results.looks))] if means else []
    if names:
        yield Section("What the starts did", text, table=lines, drawings=drawn)


def start_figure(name: str, values: Sequence[float]) -> str:
    """Return the cell of one figure of `MECHANISM`: the mean over the seeds, or the value of each."""
    form = MECHANISM[name][1]
    if name in OF_EACH_SEED:
        return ", ".join(map(form.format, values)) or "-"
    return form.format(mean(values)) if values else "-"
