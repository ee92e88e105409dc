"""What training changed in the scores of the pretrained model, for example how much it forgot."""

from collections.abc import Iterator
from statistics import mean, stdev

from lora_one.reports.compare import Run
from lora_one.reports.results import Results, Section, spread
from lora_one.statistics.units import Unit


def changes(results: Results) -> Iterator[Section]:
    """Yield for each method and evaluation the score after training minus that of the pretrained model."""
    unchanged = {method: unchanged_start(results, method) for method in results.methods}
    starts = {method: other for method, other in unchanged.items() if other is not None}
    names = [
        name for name in results.evaluations if any(results.values(other, name, "start") for other in starts.values())
    ]
    if not names:
        return
    header = ["method"]
    for name in names:
        header += [f"{results.titled(name)} pretrained", "after training", "change"]
    lines = [header]
    for method in results.methods:
        line = [method]
        for name in names:
            scores = results.by_seed(starts[method], name, "start") if method in starts else {}
            unit, after = results.unit(name), results.by_seed(method, name)
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


def unchanged_start(results: Results, method: str) -> str | None:
    """Return whose start changed no weight, on a base in the same format as the method's: its own, or the first other.

    None: that of no method. The scores depend on the seed only if the model has a new classification head.
    """
    base = formats(results.of(method, "final"))
    for name in (method, *(row["method"] for row in results.record["rows"])):
        found = results.of(name, "start")
        if found and all(run.start.get("shift") == 0 for run in found) and formats(found) == base:
            return name
    return None


def formats(runs: list[Run]) -> set[str | None]:
    """Return the formats of the base's weights in these runs; None: earlier versions did not record it."""
    return {run.identity.get("weights of the base") for run in runs}


def signed(differences: list[float], unit: Unit) -> str:
    """Return mean and standard deviation of differences with a sign, in the digits of a unit; "-": there are none."""
    if not differences:
        return "-"
    deviation = f" +- {unit.number(stdev(differences))}" if len(differences) > 1 else ""
    return unit.text(mean(differences)).split()[0] + deviation
