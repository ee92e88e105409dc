"""A report on many methods shows the best ones; nothing is lost, and nothing is corrected for fewer methods."""

import csv
from math import isclose

from lora_one.reports.compare import RATE, Run, method_row
from lora_one.reports.figures import Drawing
from lora_one.reports.findings import VALIDATION, findings
from lora_one.reports.pages import printed, write_report
from lora_one.reports.results import Results
from lora_one.reports.sections import sections
from lora_one.reports.shown import SHOWN, main_figure, shown_methods

METHODS = [f"method {number:02}" for number in range(30)]
BASELINE = METHODS[0]  # the worst one


def run(method, seed, loss, **scores):
    measured = {"validation_loss": loss, "scores": scores, "init_seconds": 1.0, "train_seconds": 1.0}
    return Run(method, "final", {RATE: 1.0}, seed, f"runs/{method}/{seed}", trainable_parameters=1, **measured)


# each is better than the one before it; noise of its own for each seed
RUNS = [
    run(method, seed, 2 - place / 100 + 0.001 * seed * place)
    for place, method in enumerate(METHODS)
    for seed in (1, 2, 3)
]


def record(methods=METHODS):
    runs = [run for run in RUNS if run.method in methods]
    rows = [method_row(name, [run for run in runs if run.method == name], {}, [{}], None) for name in methods]
    return {
        "title": "Many",
        "date": "",
        "machine": "",
        "versions": {},
        "comparison": {"evaluations": {}, "baseline": BASELINE},
        "rows": rows,
        "findings": findings(runs, BASELINE, [], VALIDATION),
        "runs": [vars(run) for run in runs],
    }


def test_the_best_methods_and_the_baseline_are_shown_in_their_order():
    best = [BASELINE, *METHODS[-SHOWN + 1 :]]
    assert shown_methods(RUNS, METHODS, VALIDATION, BASELINE) == best
    assert shown_methods(RUNS, METHODS, VALIDATION, None) == METHODS[-SHOWN:]
    assert shown_methods(RUNS, METHODS[:SHOWN], VALIDATION, None) == METHODS[:SHOWN], "no more than fit"


def test_of_scores_the_highest_are_the_best_and_a_method_without_one_is_last():
    runs = [run(method, 1, 1.0, accuracy={"value": place}) for place, method in enumerate(METHODS[1:])]
    assert main_figure(runs, ["other", "accuracy"]) == "accuracy" and main_figure(runs, []) == VALIDATION
    assert shown_methods(runs, METHODS, "accuracy", None) == METHODS[-SHOWN:]
    assert METHODS[0] not in shown_methods(runs[:25], METHODS, "accuracy", None)


def test_tables_verdicts_and_runs_are_those_of_the_shown_methods_and_failures_of_all():
    whole = record()
    failed = Run(METHODS[3], "final", {}, 9, None, "the loss became nan")
    whole["runs"].append(vars(failed))
    found = {section.title: section for section in sections(whole)}
    shown = Results(whole).methods
    assert METHODS[3] not in shown
    assert [row[0] for row in found["Results"].table[1:]] == shown
    assert [row[0] for row in found["Runs"].table[1:]] == [name for name in shown for _ in range(3)]
    sentences = found[f"Verdicts: {VALIDATION}"].items
    assert len(sentences) == SHOWN - 1 and METHODS[3] not in " ".join(sentences)
    assert METHODS[3] in found["Runs and evaluations without a result"].items[0]
    assert "best 21 of 30 methods by mean validation loss, the baseline among them" in found["Results"].text[0]


def test_p_values_are_corrected_for_all_methods():
    """As in a report that shows them all: Holm multiplies the smallest of 29 by 29."""
    (part,) = record()["findings"]
    (alone,) = record([BASELINE, METHODS[1]])["findings"]
    (single,) = alone["verdicts"]
    assert len(part["verdicts"]) == 29
    assert isclose(part["verdicts"][0]["test"]["p"], single["p"]) and part["verdicts"][0]["p"] > single["p"]


def test_all_methods_are_in_a_csv_file_with_their_verdicts(tmp_path, monkeypatch):
    monkeypatch.setattr(Drawing, "svg", lambda drawing: "<svg></svg>")  # seconds otherwise
    monkeypatch.setattr(Drawing, "png", lambda drawing: b"")
    whole = record()
    text = write_report("Many", {"": whole}, tmp_path).read_text()
    with (tmp_path / "methods.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["method"] for row in rows] == METHODS and f"| {METHODS[3]} " not in text
    outcomes = {verdict["method"]: verdict["outcome"] for verdict in whole["findings"][0]["verdicts"]}
    assert [row[f"verdict on {VALIDATION}"] for row in rows] == ["", *(outcomes[name] for name in METHODS[1:])]
    assert f"| {METHODS[-1]} " in printed(whole) and f"| {METHODS[3]} " not in printed(whole)
    write_report("Few", {"": record(METHODS[:SHOWN])}, tmp_path / "few")
    assert not (tmp_path / "few" / "methods.csv").exists(), "the report shows all"
