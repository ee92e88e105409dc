"""Evaluations of a comparison: run once on each chosen point, in the table, in verdicts, and over questions."""

import dataclasses
import doctest
import json
import statistics
from pathlib import Path

import pytest

from lora_one.errors import UsageError
from lora_one.records.folder import RunFolder
from lora_one.reports.pages import printed
from lora_one.reports.predictions import correct_answers
from lora_one.reports.sections import sections
from lora_one.runs import comparison, comparison_evaluations, experiment
from lora_one.runs.comparison_file import Comparison, Evaluation, read_comparisons
from lora_one.runs.comparison_jobs import Jobs
from lora_one.runs.comparison_runners import InThisProcess, Measures
from lora_one.runs.composition import compose
from tests.helpers.comparisons import RATE, write_problems


@pytest.fixture(scope="module")
def asked(tmp_path_factory, llama_folder):
    """A method against itself with another name: the same runs, so the same answers."""
    data = write_problems(tmp_path_factory.mktemp("data"), train=24, test=8)
    options = ["--max_new_tokens=4", "--limit=5", f"--data_path={data / 'test.jsonl'}"]
    common = ["dataset=gsm8k", f"model.name={llama_folder}", "model=tiny", "wandb.mode=disabled"]
    common += ["model.real_batch_size=8", "model.per_device_batch_size=8", "dataset.train_size=16"]
    common += ["dataset.validation_size=8", f"results_dir={tmp_path_factory.mktemp('results')}"]
    return Comparison(
        title="A method against itself",
        common=[*common, f"dataset.path={data}"],
        test=[f"dataset.path={data / 'test.jsonl'}"],
        test_examples=8,
        tuning_seeds=[1],
        seeds=[1, 2, 3],
        shared_seeds="fewer runs",
        grid={RATE: [1e-2]},
        methods={"LoRA": ["init=lora"], "the same": ["init=lora"], "full": ["init=lora", "peft=full_ft"]},
        evaluations={"exact match": Evaluation("gsm8k", options)},
        baseline="LoRA",
    )


@pytest.fixture(scope="module")
def compared(asked, tmp_path_factory):
    record = comparison.compare(asked, compose, InThisProcess(experiment.execute), tmp_path_factory.mktemp("table"))
    assert not comparison.failed(record)
    return json.loads(json.dumps(record))


def test_the_scores_are_those_of_the_command(compared):
    """Read from the metrics and predictions that lie beside each run, trained adapters and whole models."""
    record = compared
    scored = [run for run in record["runs"] if run["stage"] != "tuning"]
    assert len(scored) == 3 * 6
    for run in scored:
        score = run["scores"]["exact match"]
        folder = Path(score["predictions"]).parent
        assert folder.parents[1] == Path(run["path"])
        report = json.loads((folder / "metrics.json").read_text())
        assert score["value"] == report["metrics"]["accuracy"] and report["counts"]["total"] == 5
        kind = "model_name" if run["method"] == "full" else "adapter"
        assert report["provenance"]["fingerprints"].keys() >= {kind}
    assert all(not run["scores"] for run in record["runs"] if run["stage"] == "tuning"), (
        "the test is for what was chosen"
    )


def test_the_table_and_the_verdicts(compared):
    record, written = compared, printed(compared)
    assert "| exact match (%) " in written and "Verdicts: exact match\n" in written
    accuracy, loss = record["findings"]
    assert (accuracy["figure"], loss["figure"]) == ("exact match", "test loss")
    outcomes = {verdict["method"]: verdict["outcome"] for verdict in loss["verdicts"]}
    assert outcomes["the same"] == "not tested", "equal runs have no noise"
    same = next(entry for entry in accuracy["questions"] if entry["method"] == "the same")
    assert same["difference"] == 0.0 and all(test["p"] == 1.0 for test in same["mcnemar"].values())


def test_forgetting_is_a_loss_and_lower_is_better(compared, asked, tmp_path):
    """In nats wherever it is printed, on the same finished runs; a text has no answers to count or to compare."""
    text = tmp_path / "page.txt"
    text.write_text("A page that has nothing to do with the problems. " * 20)
    forgetting = Evaluation("text", [f"--data_path={text}", "--max_length=64"], metric="loss")
    again = dataclasses.replace(asked, evaluations={"forgetting": forgetting})
    record = json.loads(json.dumps(comparison.compare(again, compose, InThisProcess(None), tmp_path / "table")))
    assert not comparison.failed(record)
    scores = {
        (run["method"], run["seed"]): run["scores"]["forgetting"] for run in record["runs"] if run["stage"] == "final"
    }
    for score in scores.values():
        assert (score["metric"], score["unit"]["name"], score["unit"]["higher"]) == ("loss", "nats", False)
        assert score["predictions"] is None and score["answers"] is None
    written, (found, _) = printed(record), record["findings"]
    assert "| forgetting (nats) " in written
    (steps,) = [part for part in sections(record) if part.table and "test loss pretrained" in part.table[0]]
    assert steps.table[0][4:] == ["forgetting (nats) after the start", "after training"]
    assert "forgetting (%)" not in written and found["questions"] == []
    values = [scores["full", seed]["value"] for seed in (1, 2, 3)]
    assert f"| {statistics.mean(values):.4f} +- {statistics.stdev(values):.4f} " in written
    (full,) = [verdict for verdict in found["verdicts"] if verdict["method"] == "full"]
    assert full["test"]["mean"] == pytest.approx(statistics.mean(values) - scores_mean(scores, "LoRA"))
    assert " nats (95 % interval " in full["sentence"] and full["outcome"] != "not tested"
    if full["outcome"] in ("better", "worse"):
        assert (full["outcome"] == "better") == (full["test"]["mean"] < 0)


def scores_mean(scores, method):
    return statistics.mean(score["value"] for (name, _), score in scores.items() if name == method)


def test_one_step_with_the_full_gradient_is_the_start_of_a_method(asked, tmp_path):
    step = dataclasses.replace(asked, methods={"step": ["init=full_step", "peft=full_ft"]}, evaluations={}, seeds=[1])
    record = comparison.compare(
        dataclasses.replace(step, baseline=None), compose, InThisProcess(experiment.execute), tmp_path
    )
    assert not comparison.failed(record)
    (row,) = record["rows"]
    assert row["init_loss_mean"] < row["pretrained_loss"] and row["final_loss_mean"] != row["init_loss_mean"]
    start, final = (next(run for run in record["runs"] if run["stage"] == stage) for stage in ("start", "final"))
    assert start["steps"] == 0 < final["steps"] and start["start"]["gamma"] == final["start"]["gamma"]


def test_kept_epochs_are_evaluated_but_for_the_last(asked, tmp_path):
    """Two epochs: the first one by its adapter, the second one by the run's own score."""
    common = [*asked.common, "model.epochs=2", "model.keep_epochs=true", f"results_dir={tmp_path / 'results'}"]
    kept = dataclasses.replace(asked, common=common, seeds=[1], baseline=None).only(["LoRA"])
    record = comparison.compare(kept, compose, InThisProcess(experiment.execute), tmp_path)
    (final,) = [run for run in record["runs"] if run["stage"] == "final"]
    assert set(final["epoch_scores"]["exact match"]) == {"1"}
    folder = Path(final["scores"]["exact match"]["predictions"]).parent
    report = json.loads((folder / "epochs" / "1" / "metrics.json").read_text())
    assert report["model"].endswith("epochs/1") or "epochs/1" in json.dumps(report["settings"])
    assert final["epoch_scores"]["exact match"]["1"] == report["metrics"]["accuracy"]


def test_every_method_gets_the_same_number_of_further_learning_rates(asked, tmp_path):
    """Two rates and one round: the best is always an end, so two more beyond it. The plan counts them in advance."""
    refined = dataclasses.replace(asked, grid={RATE: [1e-4, 1e-3]}, refine=1, extend=0, evaluations={}, seeds=[1])
    refined = dataclasses.replace(refined, baseline=None).only(["LoRA", "full"])
    assert "LoRA: then 2 runs at further learning rates, then the best point" in comparison.plan(refined, compose)
    record = comparison.compare(refined, compose, InThisProcess(experiment.execute), tmp_path)
    for row in record["rows"]:
        tried = [r["point"][RATE] for r in record["runs"] if (r["method"], r["stage"]) == (row["method"], "tuning")]
        assert tried[:2] == [1e-4, 1e-3] and row["grid_points"] == 4
        assert tried[2:] in ([1e-2, 1e-1], [1e-5, 1e-6]) and row[RATE] in tried
    assert comparison.plan(refined, compose).endswith("to do: 0 runs with training and 0 without")


def test_a_second_call_evaluates_nothing(compared, asked, tmp_path, monkeypatch):
    record = compared
    monkeypatch.setattr(comparison_evaluations, "evaluate", None)
    comparison.compare(asked, compose, InThisProcess(None), tmp_path)
    again = json.loads((tmp_path / "comparison.json").read_text())
    assert again["runs"] == record["runs"] and again["findings"] == record["findings"]


def test_an_evaluation_that_fails_names_itself_and_the_rest_stands(compared, asked, tmp_path):
    missing = Evaluation("gsm8k", ["--data_path=/no/such/file.jsonl"])
    broken = dataclasses.replace(asked, evaluations={"other": missing} | asked.evaluations).only(["LoRA"])
    record = comparison.compare(broken, compose, InThisProcess(None), tmp_path)
    (row,) = record["rows"]
    assert comparison.failed(record)
    assert "evaluation other failed, 3 of 3 seeds: --data_path=/no/such/file.jsonl" in row["note"]
    (whole,) = [row for row in compared["rows"] if row["method"] == "LoRA"]
    for figure in ("validation_loss_mean", "final_loss_mean", "exact match_mean"):
        assert row[figure] == whole[figure]


def test_an_unexpected_error_of_an_evaluation_does_not_fail_its_run(tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(comparison_evaluations, "evaluate", broken)
    found = comparison_evaluations.scores_of(RunFolder(tmp_path), {"exact match": Evaluation("gsm8k")})
    assert found == {"exact match": {"error": "RuntimeError: CUDA error: out of memory"}}
    assert "Traceback" in capsys.readouterr().err
    kept = tmp_path / "epochs/1"
    monkeypatch.setattr(comparison_evaluations, "epochs_before_the_end", lambda folder: [kept])
    assert comparison_evaluations.epoch_scores(RunFolder(tmp_path), {"exact match": Evaluation("gsm8k")}) == {}
    assert f"failed: evaluation exact match of {kept}: RuntimeError: CUDA" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--data_path={}", "--data_path {}", "--data={}"])
def test_other_data_are_another_folder_however_the_option_is_spelt(option, tmp_path):
    folders = set()
    for content in ("one", "two"):
        comparison_evaluations.content_of.cache_clear()
        (tmp_path / "test.jsonl").write_text(content)
        evaluation = Evaluation("gsm8k", option.format(tmp_path / "test.jsonl").split())
        folders.add(comparison_evaluations.folder_of(RunFolder(tmp_path), "e", evaluation))
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evaluations: {a: {benchmark: gsm9k}}", "gsm9k is not a benchmark; did you mean gsm8k"),
        ("evaluations: {a: {options: []}}", "evaluations.a has no benchmark"),
        ("evaluations: {a: {benchmark: gsm8k, option: []}}", "unknown key evaluations.a.option"),
        (
            "evaluations: {a: {benchmark: gsm8k, options: [--limits=3]}}",
            "evaluations.a: unrecognized arguments: --limits=3",
        ),
        ("evaluations: {a: {benchmark: gsm8k, options: [--adapter=x]}}", "--adapter is set by the comparison"),
        (
            "evaluations: {a: {benchmark: commonsense, options: [--base_model=x]}}",
            "--model_name is set by the comparison; remove it",
        ),
        ("evaluations: {a: {benchmark: gsm8k, options: [--help]}}", "evaluations.a: ['--help'] runs nothing"),
        (
            "evaluations: {a: {benchmark: gsm8k, options: [--base_url=x]}}",
            "--base_url is set by the comparison; use --serve",
        ),
        ("evaluations: {a: {benchmark: [gsm8k]}}", "['gsm8k'] is not a benchmark"),
        ("evaluations: {a: {benchmark: humaneval, options: [--no_score]}}", "--no_score is set by the comparison"),
        (
            "evaluations: {a: {benchmark: gsm8k, metric: [accuracy]}}",
            "evaluations.a.metric=['accuracy'] must be a text",
        ),
        ("evaluations: [a]", "must be a mapping of names"),
        ("evaluations: {a: {options: []}}", "or <name>: {not_run: <reason>} if it is not run"),
        ("evaluations: {a: {not_run: }}", "evaluations.a.not_run=None must be a text: the reason"),
        ("evaluations: {a: {not_run: ' '}}", "evaluations.a.not_run=' ' must be a text: the reason"),
        ("evaluations: {a: {not_run: no, benchmark: gsm8k}}", "evaluations.a has other keys beside not_run: write"),
        ("baseline: LoRa", "baseline=LoRa is not a method of this comparison; did you mean LoRA"),
        ("tasks: {T: {test: none}}", "task T: test='none' must be a list of overrides"),
        ("own_grid: {LoRA: }", "own_grid.LoRA=None must be a mapping of keys"),
        ("tasks: {T: {grid: }}", "task T: grid=None must be a mapping of keys"),
        ("small: {grid: [1]}", "small: grid=[1] must be a mapping of keys"),
        ("tasks: {T: {title: 2026}}", "task T: title=2026 must be a text"),
        ("tasks: {T: {tests: []}}", "task T: unknown key tests; did you mean test"),
    ],
)
def test_wrong_entries_are_named(text, message, tmp_path):
    whole = {"title": "a", "common": "[]", "test": "[]", "test_examples": 1, "tuning_seeds": "[9]", "seeds": "[1]"}
    whole |= {"grid": f"{{{RATE}: [1e-3]}}", "methods": "{LoRA: [init=lora]}"}
    lines = [f"{key}: {value}" for key, value in whole.items()]
    (tmp_path / "file.yaml").write_text("\n".join([*lines, text]))
    with pytest.raises(UsageError) as error:
        read_comparisons(tmp_path / "file.yaml")
    assert message in str(error.value)
    (tmp_path / "file.yaml").write_text("\n".join(lines[1:]))
    with pytest.raises(UsageError, match="has no key title: add it, for example title: <text>"):
        read_comparisons(tmp_path / "file.yaml")


def test_an_evaluation_that_is_not_run_is_not_measured(asked):
    evaluations = asked.evaluations | {"MT-Bench": Evaluation(not_run="no judge")}
    jobs = Jobs(dataclasses.replace(asked, evaluations=evaluations), compose)
    assert Measures.of(jobs).evaluations == asked.evaluations


def test_tasks_extend_the_file(tmp_path):
    (tmp_path / "file.yaml").write_text(
        "title: Both\ncommon: [a=1]\ntest: [t=1]\ntest_examples: 5\ntuning_seeds: [9]\nseeds: [1, 2, 3]\n"
        f"grid: {{{RATE}: [1e-3]}}\nmethods: {{LoRA: [init=lora]}}\n"
        "tasks:\n  one: {common: [b=2], evaluations: {x: {benchmark: gsm8k}}}\n  two: {test: [t=2], seeds: [7]}\n"
    )
    one, two = read_comparisons(tmp_path / "file.yaml").values()
    assert one.common == ["a=1", "b=2"] and one.test == ["t=1"] and one.seeds == [1, 2, 3] and one.title == "Both: one"
    assert two.common == ["a=1"] and two.test == ["t=2"] and two.seeds == [7] and not two.evaluations


def test_predictions_of_other_programs_and_other_questions(tmp_path):
    ours, theirs, other = (tmp_path / f"{name}.jsonl" for name in ("ours", "theirs", "other"))
    ours.write_text('{"id": 0, "correct": true}\n{"id": 1, "correct": false}\n{"id": 1, "correct": true}\n')
    assert correct_answers(ours) == {"0": [True], "1": [False, True]}
    theirs.write_text(
        '{"doc_id": 0, "filter": "strict", "exact_match": 1.0}\n'
        '{"doc_id": 0, "filter": "flexible", "exact_match": 0.0}\n'
    )
    assert correct_answers(theirs, filtered="flexible") == {"0": [False]}
    for filtered, message in ((None, "filters strict, flexible: choose one"), ("strikt", "did you mean strict")):
        with pytest.raises(UsageError, match=message):
            correct_answers(theirs, filtered=filtered)
    ours.write_text('{"id": 0, "f1": 0.4}\n')
    with pytest.raises(UsageError, match=r"line 1: f1 is .*, which does not say whether"):
        correct_answers(ours, "f1")
    other.write_text('{"id": 0}\n')
    for file, message in ((other, "line 1: no id or no field correct"), (tmp_path / "no", "cannot be read")):
        with pytest.raises(UsageError, match=message):
            correct_answers(file)


def test_doctests():
    assert doctest.testmod(comparison_evaluations).failed == 0
