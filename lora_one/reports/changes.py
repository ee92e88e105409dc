"""What training changed in the scores of the pretrained model, for example how much it forgot."""

from collections.abc import Iterator
from statistics import mean, stdev

from lora_one.reports.compare import Run
from lora_one.reports.results import Results, Section, spread
from lora_one.statistics.units import Unit


def changes(results: Results) -> Iterator[Section]:
    """Yield for each method and evaluation the score after training minus that of the pretrained model."""
    starts = {method: unchanged_starts(results, method) for method in results.methods}
    names = [name for name in results.evaluations if any(scores_by_seed(runs, name) for runs in starts.values())]
    if not names:
        return
    header = ["method"]
    for name in names:
        header += [f"{results.titled(name)} pretrained", "after training", "change"]
    lines = [header]
    for method in results.methods:
        line = [method]
        for name in names:
            scores = scores_by_seed(starts[method], name)
            unit, after = results.unit(name), scores_by_seed(results.of(method, "final"), name)
            common = [seed for seed in after if seed in scores]
            line += [spread([values[seed] for seed in common], unit) for values in (scores, after)]
            line.append(signed([after[seed] - scores[seed] for seed in common], unit))
        lines.append(line)
    yield Section(
        "Change from the pretrained model",
        [
            "Pretrained: the scores of a start with s B A = 0 in every layer, which leaves the model as it is; a new "
            "classification head is as it was drawn. Differences of the same seed where both have a score, mean +- "
            "sample standard deviation. A loss that rises on text unlike the training data is forgetting."
        ],
        table=lines,
    )


def unchanged_starts(results: Results, method: str) -> list[Run]:
    """Return runs without training whose start changed no weight, on a base in the same format as the method's.

    They are the method's own, or those of the first method that has some; []: no method has. Their scores depend on the
    seed only if the model has a new classification head.
    """
    base = {run.identity.get("weights of the base") for run in results.of(method, "final")}
    for name in (method, *(row["method"] for row in results.record["rows"])):
        found = [run for run in results.of(name, "start") if run.start.get("shift") == 0]
        if found and {run.identity.get("weights of the base") for run in found} == base:
            return found
    return []


def scores_by_seed(runs: list[Run], figure: str) -> dict[int, float]:
    """Return the score of each run that has it, by seed."""
    return {run.seed: run.scores[figure]["value"] for run in runs if "value" in run.scores.get(figure, {})}


def signed(differences: list[float], unit: Unit) -> str:
    """Return mean and standard deviation of differences with a sign, in the digits of a unit; "-": there are none."""
    if not differences:
        return "-"
    text = f"{round(unit.scale * mean(differences), unit.digits) + 0.0:+.{unit.digits}f}"
    return text + (f" +- {unit.number(stdev(differences))}" if len(differences) > 1 else "")
