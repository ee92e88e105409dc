"""Two finished configurations and two files of predictions, with known answers."""

import json

import numpy
import pytest

from lora_one.errors import UsageError
from lora_one.reports.pairs import compare_predictions, compare_runs
from lora_one.runs import compare_command
from lora_one.statistics.questions import bootstrap
from lora_one.statistics.units import POINTS

MODEL = {"name": "m", "revision": None, "max_length": 256, "epochs": 1, "real_batch_size": 16, "loss": "token"}
ADAPTERS = {"use_peft": True, "lora_r": 8, "lora_alpha": 16.0}
CONFIG = {"model": MODEL, "dataset": {"name": "gsm8k"}, "peft": ADAPTERS, "optimizer": {"name": "adamw"}}
RECORD = {
    "status": "finished",
    "init": {"method": "LoRA"},
    "config_hash": "a",
    "provenance": {"fingerprints": {}, "versions": {"torch": "2"}},
    "data": {"train": {"whole": 10, "shortened": 0}},
    "train": {"processes": 1},
}


def final(loss):
    return {"evaluation": {"final": {"eval_loss": loss}}}


def write(path, correct):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, "correct": bool(c)}) + "\n" for i, c in enumerate(correct)))
    return path


def configuration(folder, losses, answers=None):
    for seed, loss in losses.items():
        run = folder / str(seed)
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps(RECORD | {"config": CONFIG | {"seed": seed}} | final(loss)))
        if answers is not None:
            write(run / "eval/gsm8k/predictions.jsonl", answers[seed])
            share = {"metrics": {"accuracy": float(numpy.mean(answers[seed]))}}
            (run / "eval/gsm8k/metrics.json").write_text(json.dumps(share))
    return folder


def test_predictions_by_hand(tmp_path):
    """120 questions; 8 only the first answers, 2 only the second: p = 2 (1 + 10 + 45) / 1024 = 0.11.

    Detectable: the differences have variance (10 - 120 / 400) / 119 = 0.08151, 2.8016 sqrt(0.08151 / 120) = 0.0730.
    """
    first = write(tmp_path / "a.jsonl", [1] * 8 + [0] * 2 + [1] * 60 + [0] * 50)
    second = write(tmp_path / "b.jsonl", [0] * 8 + [1] * 2 + [1] * 60 + [0] * 50)
    said = compare_predictions(first, second)
    assert f"{first}: 56.67 %" in said and f"{second}: 51.67 %" in said
    assert "+5.0 points" in said and "over 120 questions" in said
    assert said.endswith(
        "only the first and only the second answers correctly: 8 and 2, p = 0.11. If the differences vary as on these "
        "questions, 120 questions find a true difference of 7.3 points in 8 of 10 comparisons; half of that needs 480."
    ), "without a seed, which files do not have"


def test_samples_of_a_question_are_not_questions(tmp_path):
    """150 questions with 4 samples: the interval is that of the shares of each question, and McNemar has no place."""
    rng = numpy.random.default_rng(0)
    files, shares = [], []
    for name in "ab":
        samples = rng.random((150, 4)) < rng.random((150, 1))
        samples[0] = numpy.arange(4) < -samples[1:].sum() % 4  # the mean is a whole number of 150, as of single answers
        rows = [{"id": i, "correct": bool(hit)} for i, hits in enumerate(samples) for hit in hits]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
        shares.append(samples.mean(axis=1))
    low, high = (POINTS.text(end).split()[0] for end in bootstrap(*shares).interval)
    said = compare_predictions(*files)
    smallest = POINTS.text(bootstrap(*shares).detectable, "")
    assert f"(95 % interval over 150 questions {low} to {high}). If the differences vary" in said
    assert f"find a true difference of {smallest} in 8 of 10" in said and said.endswith("half of that needs 600.")
    assert f"{files[0]}: {100 * shares[0].mean():.2f} % (n = 150), field correct\n" in said, (
        "Wilson's interval is for single answers"
    )


def test_scores_of_different_kinds_are_not_compared(tmp_path):
    """lm_eval's acc and acc_norm judge one answer differently; the field that both files have is read."""

    def samples(name, **fields):
        lines = [{"doc_id": place} | {key: values[place] for key, values in fields.items()} for place in range(120)]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    plain, normed = [place < 60 for place in range(120)], [place < 75 for place in range(120)]
    both = samples("both.jsonl", acc=plain, acc_norm=normed)
    alone = samples("alone.jsonl", acc_norm=normed)
    said = compare_predictions(both, alone)
    assert "+0.0 points" in said and said.count(", field acc_norm\n") == 2
    assert "known from their ids alone" in said, "neither file has the right answers"
    with pytest.raises(UsageError, match=r"no field in common.*acc in .*plain.jsonl and acc_norm in"):
        compare_predictions(samples("plain.jsonl", acc=plain), alone)


def test_answers_that_hardly_differ_have_no_interval(tmp_path):
    for name, wrong in (("a", 0), ("b", 3)):
        rows = [{"id": i, "correct": i >= wrong} for i in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = compare_predictions(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (
        "+1.5 points (no interval: the same difference at all but 3 of 200 questions)" in said and "8 of 10" not in said
    )
    assert "only the first and only the second answers correctly: " in said and ": 3 and 0, p = 0.25" in said


def test_an_evaluation_of_other_questions_loses_no_other_result(tmp_path):
    base = configuration(tmp_path / "base", {1: 1.0, 2: 1.1, 3: 0.9}, {seed: [1, 0, 1] for seed in (1, 2, 3)})
    other = configuration(tmp_path / "other", {1: 1.2, 2: 1.31, 3: 1.09}, {seed: [1, 0] for seed in (1, 2, 3)})
    said = compare_runs(other, base)
    assert f"{other} is worse than {base}: +0.2000 nats" in said and "3 seeds" in said
    assert "these trained models: not compared: " in said and "1 only in the second one" in said


def test_a_configuration_of_which_seeds_failed_is_not_called_better(tmp_path):
    """Seeds 4 and 5 of the other one failed, perhaps because they were bad; the baseline has them."""
    base = configuration(tmp_path / "base", {1: 1.0, 2: 1.1, 3: 0.9, 4: 1.0, 5: 1.2})
    other = configuration(tmp_path / "other", {1: 0.8, 2: 0.91, 3: 0.69, 4: 0.0, 5: 0.0})
    for seed, error in ((4, "RunError: the loss\nbecame nan"), (5, None)):
        file = other / str(seed) / "run.json"
        status = "failed" if error else "interrupted"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"status": status, "error": error}))
    said = compare_runs(other, base)
    assert (
        f"{other} and {base}: not tested, because results are missing (2 seeds of {other}) and" in said
        and "is better" not in said
    )
    assert f"warning: {other}, seed 4: not compared, RunError: the loss became nan" in said
    assert f"warning: {other}, seed 5: not compared, not finished, its status is interrupted" in said
    assert f"{base} is worse than {other}" not in compare_runs(base, other)


def test_a_configuration_of_which_an_evaluation_is_missing_is_not_called_better(tmp_path):
    answers = {seed: [1, 1, 1, 1, seed < 3] for seed in (1, 2, 3, 4)}
    base = configuration(
        tmp_path / "base", dict.fromkeys(answers, 1.0), {seed: [0, 0, seed > 2, 0, 0] for seed in answers}
    )
    other = configuration(tmp_path / "other", dict.fromkeys(answers, 1.0), answers)
    (other / "4/eval/gsm8k/metrics.json").unlink()
    said = compare_runs(other, base)
    assert f"{other} and {base}: not tested, because results are missing (1 seed of {other}) and" in said
    assert f"warning: {other}, seed 4: not evaluated" in said


def test_predictions_of_other_questions_are_refused(tmp_path):
    first, second = write(tmp_path / "a.jsonl", [1] * 5), write(tmp_path / "b.jsonl", [1] * 6)
    with pytest.raises(UsageError, match="0 are only in the first one and 1 only in the second one, for example 5"):
        compare_predictions(first, second)
    with pytest.raises(UsageError, match="given twice"):
        compare_predictions(first, first)


def test_configurations_are_paired_by_seed(tmp_path):
    rng = numpy.random.default_rng(0)
    answers = {seed: rng.random(200) < 0.5 for seed in (1, 2, 3, 4)}
    worse = {seed: hits & (rng.random(200) < 0.8) for seed, hits in answers.items()}
    base = configuration(tmp_path / "base", {1: 1.0, 2: 1.1, 3: 0.9, 4: 1.0}, answers)
    other = configuration(tmp_path / "other", {1: 1.2, 2: 1.31, 3: 1.09, 4: 1.2, 7: 3.0}, worse | {7: answers[1]})
    said = compare_runs(other, base)
    assert f"{other} is worse than {base}: +0.2000 nats" in said and "4 seeds" in said
    assert f"{other} is worse than {base}: -" in said and "over 200 questions" in said
    assert all(f"seed {seed}: 0 and " in said for seed in answers), "McNemar's test of each seed"
    assert "validation accuracy" not in said


def test_predictions_with_other_right_answers_are_refused(tmp_path):
    """The ids of some sets are places in a file, so that any two files of one length have the same ones."""
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file, golds in zip(files, (("1", "2"), ("1", "3")), strict=True):
        lines = [{"id": place, "correct": True, "gold": gold} for place, gold in enumerate(golds)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UsageError, match='the right answer to 1 is "2" in the first one and "3" in the second one'):
        compare_predictions(*files)


def test_predictions_with_other_settings_are_compared_with_a_warning(tmp_path):
    files = [write(tmp_path / name / "predictions.jsonl", [1, 0, 1]) for name in "ab"]
    for file, limit in zip(files, (512, 64), strict=True):
        assert "same settings" not in compare_predictions(*files)
        (file.parent / "metrics.json").write_text(json.dumps({"settings": {"max_new_tokens": limit}}))
    assert "warning: not with the same settings: --max_new_tokens is 512 there and 64 here" in compare_predictions(
        *files
    )


def test_configurations_with_other_data_are_compared_with_a_warning(tmp_path):
    one, two = (configuration(tmp_path / name, {1: 1.0, 2: 1.1, 3: 0.9}) for name in "ab")
    assert "warning" not in compare_runs(one, two)
    file = two / "2/run.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"config": record["config"] | {"dataset": {"name": "meta_math"}}}))
    said = compare_runs(one, two).splitlines()
    assert said[0] == "warning: not the same in all runs: data: gsm8k (5 x); meta_math (1 x)"


def test_the_command(tmp_path, capsys):
    first = configuration(tmp_path / "a", {1: 1.0})
    second = configuration(tmp_path / "b", {1: 1.2})
    assert compare_command.main(["--runs", str(first), str(second)]) == 0
    assert "1 seed is too few for an interval" in capsys.readouterr().out
    files = [str(write(tmp_path / f"{name}.jsonl", [1, 0])) for name in "cd"]
    assert compare_command.main(["--predictions", *files]) == 0
    assert "2 questions are too few for an interval" in capsys.readouterr().out
    assert compare_command.main([]) == 2 and compare_command.main(["--runs", str(first), str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "nothing to compare" in said and "given twice" not in said


def test_evaluations_with_other_settings_are_compared_with_a_warning(tmp_path):
    answers = {seed: [1, 0, 1] for seed in (1, 2, 3)}
    one, two = (configuration(tmp_path / name, {1: 1.0, 2: 1.1, 3: 0.9}, answers) for name in "ab")
    assert "warning" not in compare_runs(one, two)
    file = two / "2/eval/gsm8k/metrics.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps(report | {"settings": {"chat_template": False, "adapter": "x"}}))
    assert "warning" not in compare_runs(one, two)  # earlier versions had no chat template; the models may differ
    file.write_text(json.dumps(report | {"settings": {"max_new_tokens": 160}}))
    expected = "seed 2: not with the same settings: --max_new_tokens is None there and 160 here"
    assert f"warning: {two}, {expected}" in compare_runs(one, two)
