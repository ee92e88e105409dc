"""The sections of a report on one comparison, from its record alone: text, tables and figures.

The record is the content of comparison.json, see ``record.comparison_record``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lora_one.reports import figures
from lora_one.reports.changes import changes
from lora_one.reports.compare import RATE, cell, chosen_cell, unit_cell
from lora_one.reports.curves_and_costs import costs, courses, learning_rates, mechanism
from lora_one.reports.figures import Drawing
from lora_one.reports.findings import LOSS, VALIDATION, question_sentence
from lora_one.reports.origin import fair, provenance
from lora_one.reports.results import NOT_RUN, Results, Section, spread
from lora_one.statistics.units import NATS

RESULTS, VERDICTS = "Results", "Verdicts"
Maker = Callable[[Results], Iterator[Section]]


def sections(record: Mapping[str, Any]) -> list[Section]:
    """Return the sections that the record has data for, in the order of the report."""
    return made(PARTS, record)


def short_sections(record: Mapping[str, Any]) -> list[Section]:
    """Return the main table and the verdicts."""
    return made((table, verdicts), record)


def made(parts: Sequence[Maker], record: Mapping[str, Any]) -> list[Section]:
    """Return the sections of these parts that the record has data for; without any run the table alone."""
    results = Results(record)
    parts = parts if results.runs else [table]
    return [section for part in parts for section in part(results) if section.items or section.table or section.text]


def verdicts(results: Results) -> Iterator[Section]:
    """Yield for each figure the sentence on each method, and a forest plot of the differences."""
    if results.baseline and not results.record["findings"]:
        yield Section(VERDICTS, [f"Not tested: no run of the baseline {results.baseline} has a result."])
    for number, part in enumerate(results.record["findings"]):
        if not part["verdicts"] and len(results.methods) > 1:
            known = results.values(results.baseline, part["figure"], "final")
            reason = "no other method has a result" if known else f"{results.baseline} has no result"
            yield Section(f"{VERDICTS}: {part['figure']}", [f"Not tested: {reason}."])
            continue
        unit = results.unit(part["figure"])
        rows = [
            figures.Difference(
                verdict["method"],
                [unit.scale * value for value in verdict["test"]["differences"]],
                unit.scale * verdict["test"]["mean"],
                verdict["test"]["interval"] and tuple(unit.scale * end for end in verdict["test"]["interval"]),
            )
            for verdict in part["verdicts"]
            if verdict["test"] is not None and verdict["method"] in results.methods
        ]
        lines = ", lines 95 % intervals of each method alone" * any(row.interval is not None for row in rows)
        caption = f"{part['figure']}: paired differences to {results.baseline}; dots are seeds{lines}."
        drawn = [
            Drawing(
                f"differences-{number + 1}", caption, figures.forest(rows, results.baseline, unit.name, results.looks)
            )
        ]
        sentences = [verdict["sentence"] for verdict in part["verdicts"] if verdict["method"] in results.methods]
        text = ["Lower is better."] if sentences and not unit.higher else []
        yield Section(f"{VERDICTS}: {part['figure']}", text, sentences, drawings=drawn if rows else ())


def table(results: Results) -> Iterator[Section]:
    """Yield the main table: chosen values, scores and losses, the verdict on the main figure, and notes below."""
    titles = ["learning rate" if key == RATE else key.rpartition(".")[2] for key in results.keys]
    losses = {LOSS: "final_loss", VALIDATION: "validation_loss"}
    losses = {
        title: name
        for title, name in losses.items()
        if any(row.get(f"{name}_mean") is not None for row in results.rows)
    }
    found = results.outcomes
    header = ["method", *titles, "seeds"]
    for name in (*results.evaluations, *results.not_run):
        header += [results.titled(name), *["published"] * (name in results.published)]
    lines = [header + [*losses] + [f"verdict on {results.figure}"] * bool(found)]
    for row in results.rows:
        ends = dict(part.split("=") for part in row.get("edge", "").split())
        chosen = results.chosen(row["method"]) or {}
        line = [row["method"]]
        line += [chosen_cell(row.get(key), ends.get(key), known=key in chosen) for key in results.keys]
        line.append(cell(row.get("seeds")))
        for name in (*results.evaluations, *results.not_run):
            score = unit_cell(row.get(f"{name}_mean"), row.get(f"{name}_sd"), results.unit(name))
            line.append(NOT_RUN if name in results.not_run else score)
            line += [results.published_cell(row["method"], name)] * (name in results.published)
        line += [unit_cell(row.get(f"{name}_mean"), row.get(f"{name}_sd"), NATS) for name in losses.values()]
        lines.append(line + [found.get(row["method"], "-")] * bool(found))
    notes = [f"{row['method']}: {' '.join(row['note'].split())}" for row in results.rows if row["note"]]
    notes += [f"{name}: {NOT_RUN}: {' '.join(reason.split())}" for name, reason in results.not_run.items()]
    deviations = ["Mean +- sample standard deviation over the seeds."] * bool(results.runs)
    text = [*protocol(results), *left_out(results), *deviations]
    if any(row.get("edge") for row in results.rows):
        text[-1] += " (lowest), (highest), (only): place in the values tried."
    if results.published:
        text.append(f"Published: {results.source}")
    yield Section(RESULTS, text, notes, lines)


def left_out(results: Results) -> list[str]:
    """Return which methods the report leaves out, [] if it shows all."""
    if not results.omitted:
        return []
    every = f"{len(results.methods) + results.omitted:,}"
    kept = ", the baseline among them" if results.baseline in results.methods else ""
    return [
        f"Shown are the best {len(results.methods)} of {every} methods by mean {results.figure}{kept}; all are in the "
        "file methods.csv. Failures, and what is the same for every method, are those of all runs; p values are "
        "corrected for all methods."
    ]


def protocol(results: Results) -> list[str]:
    """Return how the methods were tuned and tested, [] for runs that no comparison has done, or without runs."""
    asked = results.record["comparison"]
    if not asked.get("tuning_seeds") or not results.runs:
        return []
    tuning, seeds = (", ".join(map(str, asked[key])) for key in ("tuning_seeds", "seeds"))
    rounds, more = asked.get("refine") or 0, asked.get("extend") or 0
    further = f", then {rounds} {'round' if rounds == 1 else 'rounds'} of two further rates, beyond the best one if it "
    further += "was at an end of those tried, otherwise between its neighbours"
    if more:
        further += f", and at most {more} more while a method had too few between neighbours"
    found = (
        f"Each method ran every point of its grid with seed {tuning}{further * (rounds > 0)}, then the point with "
        f"the lowest validation loss with seeds {seeds}. "
    )
    if results.baseline:
        found += "Verdicts hold for these points: the noise of choosing them is not part of them. "
    omitted = asked.get("left_out")
    if omitted:
        tests = ", so that p values are corrected for them" if results.baseline else ""
        found += f"Left out, but part of the comparison{tests}: {', '.join(omitted)}. "
        found += "Without a baseline nothing is tested. " * (not results.baseline)
    if results.record.get("test", {}).get("counts", {}).get("seen"):
        return [found + "Some test examples were also used for training or choosing, see Origin."]
    found += "The test examples were used for neither training nor choosing, and only at the chosen points"
    return [found + ("; of the evaluations' questions this is not checked." if results.evaluations else ".")]


def questions(results: Results) -> Iterator[Section]:
    """Yield the tests over the questions of each evaluation."""
    for part in results.record["findings"]:
        entries = [entry for entry in part["questions"] if entry["method"] in results.methods]
        if entries:
            yield Section(
                f"The trained models on the questions: {part['figure']}",
                [
                    "Shares of correct answers of these trained models; this is no statement about the methods. "
                    "p values are those of each pair alone, not corrected for their number."
                ],
                [f"{question_sentence(entry, results.baseline)}." for entry in entries],
                folded=True,
            )
        elif part.get("untested"):
            yield Section(f"The trained models on the questions: {part['figure']}", [f"Not tested: {part['untested']}"])


def steps(results: Results) -> Iterator[Section]:
    """Yield the test loss and the scores without an adapter, after the start, and after training."""
    before = {row["method"]: row.get("pretrained_loss") for row in results.rows}
    if not any(results.values(method, LOSS, "start") for method in results.methods):
        return
    header = ["method", "test loss pretrained", "after the start", "after training"]
    for name in results.evaluations:
        header += [f"{results.titled(name)} after the start", "after training"]
    lines = [header]
    for method in results.methods:
        line = [method, unit_cell(before[method], None, NATS)]
        line += [spread(results.values(method, LOSS, stage)) for stage in ("start", "final")]
        for name in results.evaluations:
            line += [spread(results.values(method, name, stage), results.unit(name)) for stage in ("start", "final")]
        lines.append(line)
    text = ["After the start: the same run without training. Mean +- sample standard deviation over the seeds."]
    yield Section("From the pretrained model to the trained one", text, table=lines)


def answers(results: Results) -> Iterator[Section]:
    """Yield the shares of answers that were not understood, or cut off at the limit of new tokens."""
    lines = [["method", "evaluation", "answers", "unparsed (%)", "cut off (%)"]]
    for method in results.methods:
        for name in results.evaluations:
            found = [run.scores[name] for run in results.of(method, "final") if "value" in run.scores.get(name, {})]
            total = sum(score.get("answers") or 0 for score in found)
            if total:
                lines.append([method, name, str(total), *(share(found, kind, total) for kind in ("unparsed", "cut"))])
    if len(lines) > 1:
        yield Section("Unparsed and cut answers", ["Over all seeds of the chosen point."], table=lines)


def share(scores: list[dict[str, Any]], kind: str, total: int) -> str:
    """Return the share of a kind of answers in percent; "-": its benchmark does not count it."""
    counts = [score.get(kind) for score in scores]
    return "-" if None in counts else f"{100 * sum(counts) / total:.1f}"


def failures(results: Results) -> Iterator[Section]:
    """Yield the runs without a result and the reason of each."""
    failed = [run for run in results.runs if run.error is not None]
    lines = [f"{run.method}, {run.stage}, seed {run.seed}: {' '.join(run.error.split())}" for run in failed]
    for run in results.runs:
        errors = {name: score["error"] for name, score in run.scores.items() if "error" in score}
        lines += [f"{run.method}, {run.stage}, seed {run.seed}, {name}: {error}" for name, error in errors.items()]
    yield Section("Runs and evaluations without a result", items=lines)


PARTS: tuple[Maker, ...] = (
    table,
    verdicts,
    steps,
    changes,
    learning_rates,
    courses,
    costs,
    mechanism,
    answers,
    questions,
    failures,
    fair,
    provenance,
)
