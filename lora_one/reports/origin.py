"""The sections of a report on how its numbers came about: what was equal, settings, origin, and every run."""

from collections.abc import Iterator, Mapping
from typing import Any

from lora_one.reports.compare import value_text
from lora_one.reports.fairness import fairness
from lora_one.reports.results import Results, Section
from lora_one.statistics.shares import hits_in, wilson
from lora_one.statistics.units import Unit


def fair(results: Results) -> Iterator[Section]:
    """Yield what was checked to be the same in all runs."""
    yield Section(
        "The same for every method",
        table=fairness(results.runs, results.record["comparison"]),
        items=results.record.get("uneven", ()),
    )
    asked = results.record["comparison"].get("methods") or {}
    lines = [[method, " ".join(asked[method]) or "-"] for method in results.methods if method in asked]
    if lines:
        text = [f"Overrides of all: {' '.join(results.record['comparison'].get('common') or ['none'])}."]
        text += ["Each method adds those below; the rest are the grid and the defaults of that version."]
        yield Section("Settings of each method", text, table=[["method", "overrides"], *lines])


def provenance(results: Results) -> Iterator[Section]:
    """Yield the origin of the numbers: command, machine, versions, commits, and the folder of every run."""
    record = results.record
    done = [run for run in results.runs if run.error is None]
    commits = sorted({str(run.git_commit) for run in done})
    machines = sorted({run.identity["machine"] for run in done if run.identity.get("machine")})
    lines = [["", ""], ["command", record.get("command") or "-"], ["date", record["date"]]]
    lines.append(["machine", "; ".join(machines) or record["machine"]])
    lines.append(["runs at commit", ", ".join(commits)])
    lines += [[name, version] for name, version in record["versions"].items()]
    lines += [[f"evaluation {name}", evaluation_text(results, name)] for name in results.evaluations]
    counts = record.get("test", {}).get("counts")
    if counts:
        lines.append(["test data", f"{counts['examples']} examples, {counts['tokens']} tokens with a loss"])
        if counts["examples"] < record["comparison"].get("test_examples", 0):
            lines[-1][-1] += f"; {record['comparison']['test_examples']} were asked for"
        if counts.get("seen"):
            reason = record["comparison"]["overlap"]
            lines.append(["test examples that are also training or validation examples", f"{counts['seen']}: {reason}"])
    yield Section("Origin", table=lines)
    yield from each_run(results)


def evaluation_text(results: Results, name: str) -> str:
    """Return the metric of an evaluation, and how it was made: its benchmark and options."""
    metric = next((run.scores[name]["metric"] for run in results.runs if "metric" in run.scores.get(name, {})), "-")
    asked = results.record["comparison"]["evaluations"][name]
    return " ".join(
        [metric, *([f"of {asked['benchmark']}"] if "benchmark" in asked else []), *asked.get("options", ())]
    )


def each_run(results: Results) -> Iterator[Section]:
    """Yield the settings, the scores and the folder of every run."""
    lines = [["method", "stage", *results.keys, "seed", *map(results.titled, results.evaluations), "folder"]]
    for run in (run for run in results.runs if run.method in results.methods):
        values = [value_text(run.point[key]) if key in run.point else "-" for key in results.keys]
        scores = [score_text(run.scores.get(name, {}), results.unit(name)) for name in results.evaluations]
        lines.append([run.method, run.stage, *values, str(run.seed), *scores, run.path or "-"])
    text = ["In brackets: Wilson's 95 % interval of the share of correct answers, over the questions of this one run."]
    text *= any(" [" in cell for line in lines[1:] for cell in line[-1 - len(results.evaluations) : -1])
    yield Section("Runs", text, table=lines, folded=True)


def score_text(score: Mapping[str, Any], unit: Unit) -> str:
    """Return the score of one run; a share of correct answers with its interval; "-" without a score.

    pass@k has several answers of a question, which are not independent, so that it has no interval here.
    """
    value, n = score.get("value"), score.get("answers")
    if value is None:
        return "-"
    share = score.get("field") is not None and score["metric"].startswith("accuracy")
    if not share or not n or hits_in(value, n) is None:
        return unit.number(value)
    low, high = map(unit.number, wilson(value, n))
    return f"{unit.number(value)} [{low}, {high}]"
