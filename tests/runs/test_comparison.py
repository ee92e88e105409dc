"""A comparison is honest: chosen by validation, reported on another split, the same work for every method."""

import csv
import dataclasses
import io
import json
import math
import runpy
from pathlib import Path

import numpy
import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_one.config import RunConfig
from lora_one.errors import RunError, UsageError
from lora_one.records.folder import RunFolder
from lora_one.reports.compare import Run, grid_points
from lora_one.reports.pages import printed, write_report
from lora_one.runs import comparison, comparison_file, comparison_jobs, experiment
from lora_one.runs.comparison_file import Comparison
from lora_one.runs.comparison_runners import InThisProcess
from lora_one.runs.composition import compose
from lora_one.training import batches as collating
from tests.helpers.comparisons import RATE, write_problems
from tests.helpers.paths import ROOT
from tests.helpers.runs import composed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """32 generated problems to train and choose by, 12 others to report on."""
    return write_problems(tmp_path_factory.mktemp("problems"), train=32, test=12)


@pytest.fixture(scope="module")
def asked(tmp_path_factory, data, llama_folder):
    """Two methods that run and one whose rank fits no layer; half of the steps are a warm-up."""
    common = ["dataset=gsm8k", "model=tiny", "model.eval_epochs=1", "model.warmup=0.5", "wandb.mode=disabled"]
    common += [f"model.name={llama_folder}", "model.real_batch_size=8", "model.per_device_batch_size=8"]
    common += [f"dataset.path={data}", "dataset.train_size=24", "dataset.validation_size=8"]
    return Comparison(
        title="Two and a broken one",
        common=[*common, f"results_dir={tmp_path_factory.mktemp('results')}"],
        test=[f"dataset.path={data / 'test.jsonl'}"],
        test_examples=10,
        tuning_seeds=[1],
        seeds=[1, 2],
        shared_seeds="fewer runs",
        grid={RATE: [1e-3, 1e-2]},
        methods={"broken": ["peft.lora_r=5000"], "LoRA": ["init=default"], "LoRA-SB": ["init.direction=LoRA-SB"]},
        not_run={"CorDA": "no attrs"},
    )


class Counting:
    """experiment.execute, with what it was asked for."""

    def __init__(self):
        self.runs: list[RunConfig] = []

    def __call__(self, run):
        self.runs.append(run)
        experiment.execute(run)


@pytest.fixture(scope="module")
def compared(asked, tmp_path_factory):
    output, execute = tmp_path_factory.mktemp("table"), Counting()
    comparison.compare(asked, compose, InThisProcess(execute), output)
    return json.loads((output / "comparison.json").read_text()), execute.runs, output


def test_the_methods_take_turns(asked):
    """The runs of one start are not side by side, so that init.cache computes it once."""
    methods = {"LoRA": ["init=default"], "LoRA-SB": ["init.direction=LoRA-SB"]}
    planned = []
    jobs = comparison_jobs.Jobs(dataclasses.replace(asked, methods=methods), compose)
    comparison.tuned(jobs, lambda some: planned.extend(some) or [None] * len(some))
    rates = asked.grid[RATE]
    assert [(job.point[RATE], job.method) for job in planned] == [(rate, name) for rate in rates for name in methods]


def tuned_on(asked, minima, *, refine, extend, known=()):
    """The tuning of methods whose loss is a parabola in the log of the rate; without ``known``, of finished runs."""
    grid = {RATE: [1e-3, 1e-2, 1e-1]}
    methods = {name: ["init=default", f"peft.lora_r={rank}"] for rank, name in enumerate(minima, 1)}
    changed = dataclasses.replace(asked, methods=methods, grid=grid, refine=refine, extend=extend, tuning_seeds=[1])

    def measured(some):
        losses = [math.log10(job.point[RATE] / minima[job.method]) ** 2 for job in some]
        runs = [
            Run(job.method, "tuning", job.point, job.seed, None, validation_loss=loss)
            for job, loss in zip(some, losses, strict=True)
        ]
        return [None if known and run.method not in known else run for run in runs]

    return comparison.tuned(comparison_jobs.Jobs(changed, compose), measured)


@pytest.mark.parametrize(
    ("minima", "refine", "extend", "points", "chosen"),
    [
        ({"inside": 1e-2, "beyond": 1.0}, 1, 0, 5, {"inside": 1e-2, "beyond": 1.0}),
        ({"inside": 1e-2, "beyond": 0.5}, 1, 2, 7, {"inside": 1e-2, "beyond": 0.316}),
        ({"inside": 1e-2, "too": 9e-3}, 1, 2, 5, {"inside": 1e-2, "too": 1e-2}),
        ({"inside": 1e-2, "beyond": 0.5}, 2, 1, 9, {"inside": 1e-2, "beyond": 0.562}),
        ({"inside": 1e-2, "never": 1e30}, 1, 2, 9, {"inside": 1e-2, "never": 1e5}),
        ({"inside": 1e-2, "never": 1e30}, 0, 2, 3, {"inside": 1e-2, "never": 1e-1}),
    ],
)
def test_every_method_gets_its_rounds_between_neighbours_and_all_the_same_number(
    asked, minima, refine, extend, points, chosen
):
    found = tuned_on(asked, minima, refine=refine, extend=extend)
    assert {len(tuning.points) for tuning in found.values()} == {points}
    assert {name: tuning.chosen[RATE] for name, tuning in found.items()} == chosen
    assert all(tuning.over for tuning in found.values())


@pytest.mark.parametrize(("extend", "over"), [(0, True), (2, False)])
def test_a_dry_run_knows_no_round_that_depends_on_missing_runs(asked, extend, over):
    found = tuned_on(asked, {"done": 1e-2, "missing": 1e-2}, refine=1, extend=extend, known=["done"])
    assert (len(found["done"].points), found["done"].over) == (5, over)
    assert (len(found["missing"].points), found["missing"].over) == (3, False)


def test_a_failed_run_is_known_and_does_not_hide_what_follows(asked, tmp_path):
    """It is run again, and may fail again; until then its point is not chosen, and the other points are."""
    changed = dataclasses.replace(asked, common=[*asked.common, f"results_dir={tmp_path}"], refine=1, extend=2)
    jobs = comparison_jobs.Jobs(changed, compose)
    job, waiting = jobs.tuning("LoRA", [{RATE: 1e-3}, {RATE: 1e-2}])
    job.folder.path.mkdir(parents=True)
    job.folder.run_json.write_text(json.dumps({"status": "failed", "error": "RunError: the loss became nan"}))
    found, missing = comparison.found_already([job, waiting])
    assert (found.error, found.validation_loss, missing) == ("RunError: the loss became nan", None, None)
    refused = dataclasses.replace(changed, methods={"refused": ["peft.lora_r=0"]})
    (invalid,) = comparison.found_already(comparison_jobs.Jobs(refused, compose).tuning("refused", [{RATE: 1e-3}]))
    assert "peft.lora_r=0" in invalid.error


def test_a_plan_counts_what_follows_a_point_that_cannot_run(asked, tmp_path):
    """The other points are chosen from."""
    grid = {"peft.lora_r": [4, 0]}
    changed = dataclasses.replace(asked, common=[*asked.common, f"results_dir={tmp_path}"], grid=grid, own_grid={})
    jobs = comparison_jobs.Jobs(changed.only(["LoRA"]), compose)
    further = len(set(asked.seeds) - set(asked.tuning_seeds))
    planned = comparison.to_do(jobs, comparison.tuned(jobs, comparison.found_already))
    assert planned == (len(asked.tuning_seeds) + further, len(asked.seeds))
    assert f"LoRA: then the best point (further seeds: {further}" in comparison.plan(changed.only(["LoRA"]), compose)


def runs_of(record, method, stage):
    return [run for run in record["runs"] if (run["method"], run["stage"]) == (method, stage)]


def test_whole_grid_with_the_tuning_seed_then_the_best_point_with_every_seed(compared):
    record, executed, _ = compared
    for method in ("LoRA", "LoRA-SB"):
        tuning, final = runs_of(record, method, "tuning"), runs_of(record, method, "final")
        assert [(run["point"][RATE], run["seed"]) for run in tuning] == [(1e-3, 1), (1e-2, 1)]
        losses = {run["point"][RATE]: RunFolder(Path(run["path"])).read()["evaluation"]["final"] for run in tuning}
        best = min(losses, key=lambda rate: losses[rate]["eval_loss"])
        assert [(run["point"][RATE], run["seed"]) for run in final] == [(best, 1), (best, 2)]
        assert final[0]["path"] in {run["path"] for run in tuning}, "the tuning seed's run is taken again"
        assert all(run["test_loss"] is None for run in tuning), "the test split is for what was chosen"
    trained = [run for run in executed if run.peft.lora_r == 8 and run.model.epochs > 0]
    assert len(trained) == 2 * (2 + 1)


def test_a_rank_relative_to_the_width_is_compared_too(asked, tmp_path):
    """The job's folder is the one that the run writes to: rank 4 of a width of 32."""
    share = {"LoRA": ["init=default", "peft.lora_relative_r=0.125"]}
    small = dataclasses.replace(asked, methods=share, grid={RATE: [1e-3]}, seeds=[1], not_run={})
    small = dataclasses.replace(small, common=[*asked.common, f"results_dir={tmp_path / 'results'}"])
    record = comparison.compare(small, compose, InThisProcess(experiment.execute), tmp_path)
    assert [run["error"] for run in record["runs"]] == 3 * [None]
    assert {RunFolder(Path(run["path"])).read()["config"]["peft"]["lora_r"] for run in record["runs"]} == {4}


def test_second_call_runs_nothing_that_was_finished(compared, asked, tmp_path, monkeypatch):
    record, _, output = compared
    monkeypatch.setattr("lora_one.evaluation.held_out.load_model", None)
    execute = Counting()
    comparison.compare(asked, compose, InThisProcess(execute), output)
    assert {run.peft.lora_r for run in execute.runs} == {5000}, "only what failed is tried again"
    again = json.loads((output / "comparison.json").read_text())
    assert again["rows"] == record["rows"] and again["runs"] == record["runs"]


def test_failed_method_is_in_the_table_and_the_others_too(compared):
    record, _, output = compared
    broken, *others, absent = record["rows"]
    assert comparison.failed(record)
    assert broken["method"] == "broken" and broken["failed_runs"] == 2 and broken["final_loss_mean"] is None
    assert "without a result, 2 of 2 runs: peft.lora_r=5000 exceeds the smaller dimension 32" in broken["note"]
    assert all(row["note"] == "" and row["seeds"] == 2 and row["final_loss_sd"] is not None for row in others)
    assert absent == {"method": "CorDA", "note": "not run yet: no attrs"}
    written = printed(record)
    assert all(f"| {row['method']} " in written for row in record["rows"]) and "not run yet: no attrs" in written
    lines = list(csv.DictReader(io.StringIO((output / "comparison.csv").read_text())))
    assert [line["method"] for line in lines] == [row["method"] for row in record["rows"]]
    assert float(lines[1]["final_loss_mean"]) == record["rows"][1]["final_loss_mean"]
    assert {"machine", "versions", "date", "git_commit"} <= record.keys()


def by_hand(data, tokenizer, model):
    """Sum of the answers' cross-entropies over their tokens, for the first ten test problems, one at a time."""
    total = count = 0
    for line in (data / "test.jsonl").read_text().splitlines()[:10]:
        row = json.loads(line)
        prompt = tokenizer(f"Q: {row['question']}\nA: ")["input_ids"]
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            said = torch.log_softmax(model(ids).logits[0], dim=-1)
        total -= sum(float(said[at - 1, ids[0, at]]) for at in range(len(prompt), ids.shape[1]))
        count += len(answer)
    return total / count


def test_reported_loss_is_that_of_plain_peft_on_the_test_problems(compared, data, tokenizer, llama_folder):
    record, *_ = compared
    plain = by_hand(data, tokenizer, AutoModelForCausalLM.from_pretrained(llama_folder).eval())
    for row in record["rows"][1:3]:
        assert row["pretrained_loss"] == pytest.approx(plain, rel=1e-5)
        for stage, name in (("start", "init_loss"), ("final", "final_loss")):
            losses = []
            for run in runs_of(record, row["method"], stage):
                base = AutoModelForCausalLM.from_pretrained(llama_folder)
                model = PeftModel.from_pretrained(base, Path(run["path"]) / "adapter").eval()
                losses.append(by_hand(data, tokenizer, model))
                assert run["test_loss"] == pytest.approx(losses[-1], rel=1e-5)
            assert row[f"{name}_mean"] == pytest.approx(numpy.mean(losses), rel=1e-5)
    lora, core = record["rows"][1:3]
    assert lora["init_loss_mean"] == pytest.approx(plain, rel=1e-6), "plain LoRA starts at the pretrained function"
    assert abs(core["init_loss_mean"] - plain) > 1e-4 and abs(lora["final_loss_mean"] - plain) > 1e-4


def test_evaluation_is_kept_beside_the_run(compared):
    record, *_ = compared
    run = runs_of(record, "LoRA", "final")[0]
    (file,) = Path(run["path"]).glob("eval/loss-*/metrics.json")
    report = json.loads(file.read_text())
    assert {"task", "metrics", "counts", "model", "settings", "seconds", "provenance"} == report.keys()
    assert report["metrics"]["loss"] == run["test_loss"] and report["metrics"]["loss_stderr"] > 0
    assert report["counts"]["examples"] == 10 == report["counts"]["examples"] + report["counts"]["dropped"]


def test_start_run_has_the_initialisation_of_the_trained_run(compared):
    """Also where it depends on the warm-up, of which a run without training has none."""
    record, *_ = compared
    for trained, start in zip(*(runs_of(record, "LoRA-SB", stage) for stage in ("final", "start")), strict=True):
        one, two = (RunFolder(Path(run["path"])).read()["init"] for run in (trained, start))
        assert one["eta"] == two["eta"] == pytest.approx(trained["point"][RATE] / 2)
        assert one["relative_shift"] == two["relative_shift"] and one["loss_after"] == two["loss_after"]
        assert trained["seed"] == start["seed"] and start["steps"] == 0


def test_run_does_not_depend_on_earlier_runs(compared, asked, tmp_path):
    """Bitwise: earlier runs in the same process have no effect."""
    record, *_ = compared
    run = runs_of(record, "LoRA", "final")[1]
    overrides = [*asked.common, *asked.methods["LoRA"], f"{RATE}={run['point'][RATE]}", "seed=2"]
    experiment.execute(RunConfig.from_hydra(composed(*overrides, f"results_dir={tmp_path}")))
    (alone,) = tmp_path.rglob("adapter/adapter_model.safetensors")
    assert alone.read_bytes() == (Path(run["path"]) / "adapter/adapter_model.safetensors").read_bytes()


def test_every_method_sees_the_same_examples_in_the_same_order(asked, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        collating,
        "collate",
        lambda batch, pad, collate=collating.collate: seen[-1].extend(batch) or collate(batch, pad),
    )
    for init, seed in (("default", 1), ("gradient", 1), ("svd", 1), ("default", 2)):
        seen.append([])
        experiment.execute(compose([*asked.common, f"init={init}", f"seed={seed}", f"results_dir={tmp_path}"]))
    first, *same, other = ([tuple(example.input_ids) for example in batches] for batches in seen)
    assert len(first) == 24 and same == [first, first]
    assert other != first and sorted(other) == sorted(first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"LoRA": "init=default"}}, "methods.LoRA='init=default' must be a list of overrides"),
        ({"methods": {}}, "contains no method"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must be a list of different integers"),
        ({"test_examples": 0}, "test_examples=0 must be at least 1"),
        ({"grid": {RATE: ["a"]}}, r"model.learning_rate=\['a'\] must be a list of numbers"),
        ({"grid": {"model.epochs": [1, 2]}}, "model.epochs must be the same for every method; move it to common"),
        ({"own_grid": {"LoRA": {RATE: [1e-3]}}}, "1 values of model.learning_rate, but 2 for the other"),
        (
            {"own_grid": {"LoRA": {"model.warmup": [0.1, 0.2]}}},
            "LoRA is tuned over 4 points and broken over 2: give every method the same number, or say in unequal_",
        ),
        ({"refine": -1}, "refine=-1 must be a number of rounds"),
        ({"extend": None}, "extend=None must be a number of rounds"),
        (
            {"shared_seeds": None},
            r"seeds=\[1, 2\] and tuning_seeds=\[1\] share 1: a method would be reported on the run",
        ),
        ({"refine": 1, "grid": {RATE: [1e-3]}}, "refine=1 needs at least two values of model.learning_rate"),
        (
            {"own_grid": {"LoRa": {RATE: [1e-3, 1]}}},
            "own_grid.LoRa is not a method of this comparison; did you mean LoRA?",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_comparison(changes, message, asked):
    with pytest.raises(UsageError, match=message):
        comparison_file.check_comparison(dataclasses.replace(asked, **changes))


def test_method_with_other_data_or_more_steps_is_not_run(asked):
    for override, message in (
        ("model.epochs=2", "epochs=2.0, the others 1.0"),
        ("dataset.train_size=16", "=16, the"),
        ("dataset.train_on_inputs=true", "train_on_inputs=True, the others False"),
    ):
        jobs = comparison_jobs.Jobs(dataclasses.replace(asked, methods={"LoRA": ["init=default", override]}), compose)
        assert all(
            message in job.error and "move it to common" in job.error
            for job in jobs.tuning("LoRA", grid_points(asked.grid))
        )


def test_a_grid_has_any_values(asked):
    """Texts, lists, booleans and null arrive as they are written in an override."""
    grid = {RATE: [1e-3], "optimizer": ["adamw", "scaled_adamw"], "peft.lora_target_modules": [["q_proj"], "all"]}
    grid |= {"peft.use_rslora": [True, False]}
    wide = dataclasses.replace(asked, grid=grid, methods={"LoRA": ["init=lora"]})
    jobs = comparison_jobs.Jobs(wide, compose).tuning("LoRA", grid_points(grid))
    found = [(j.config.optimizer.name, j.config.peft.lora_target_modules, j.config.peft.use_rslora) for j in jobs]
    assert len(set(map(str, found))) == 8 and found[0] == ("adamw", ["q_proj"], True)
    assert found[-1] == ("scaled_adamw", "all", False)
    assert (
        str(jobs[0])
        == "LoRA, learning_rate 0.001, optimizer adamw, lora_target_modules [q_proj], use_rslora true, seed 1"
    )


def test_test_examples_that_were_trained_on_are_refused(asked, data, tmp_path):
    with pytest.raises(UsageError, match="10 of the 10 test examples are also training or validation examples"):
        comparison.compare(dataclasses.replace(asked, test=[]), compose, InThisProcess(Counting()), tmp_path)


def test_a_reason_for_test_examples_that_were_trained_on_is_printed(asked, tmp_path):
    reason = "the published sets share them"
    only = dataclasses.replace(asked, test=[], overlap=reason, methods={"LoRA": ["init=default"]}, seeds=[1])
    record = comparison.compare(only, compose, InThisProcess(experiment.execute), tmp_path)
    assert record["test"]["counts"]["seen"] == 10
    text = write_report("Seen", {"": record}, tmp_path).read_text()
    assert f"| 10: {reason} " in text


def test_diverged_point_is_not_chosen_and_is_reported(compared, asked, tmp_path):
    """The other point is finished already, whichever it is."""
    record, *_ = compared
    best = record["rows"][1][RATE]

    def execute(run):
        raise RunError("the loss became nan")

    only = dataclasses.replace(asked.only(["LoRA"]), grid={RATE: [best, 0.5]})
    assert comparison.failed(comparison.compare(only, compose, InThisProcess(execute), tmp_path))
    (row,) = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert row[RATE] == best and row["final_loss_mean"] == record["rows"][1]["final_loss_mean"]
    assert row["note"] == "without a result, 1 of 6 runs: the loss became nan" and row["edge"] == f"{RATE}=lowest"


def test_p_values_of_a_part_are_those_of_the_whole(asked):
    """Otherwise a method could be called better by running it alone with the baseline."""
    whole = dataclasses.replace(asked, baseline="LoRA")
    assert whole.only(["LoRA", "LoRA-SB"]).left_out == ["broken"] and whole.only(None).left_out == []


def test_dry_run_lists_every_run_and_runs_none(compared, asked, monkeypatch):
    monkeypatch.setattr(experiment, "experiment", None)
    said = comparison.plan(dataclasses.replace(asked, seconds_per_run=30), compose).splitlines()
    assert said[1].startswith("broken, learning_rate 0.001, seed 1: to do, ")
    assert sum(": finished, " in line for line in said) == 2 * (2 + 2 + 2)
    assert "CorDA: not run yet: no attrs" in said
    assert said[-1] == "to do: 3 runs with training and 2 without, about 2 minutes (30 s per run with training)"


@pytest.fixture
def script():
    """main of scripts/compare.py, in this process."""
    return runpy.run_path(str(ROOT / "scripts/compare.py"))["main"]


def test_script_takes_overrides_after_the_file_s_own_and_runs_none_in_a_dry_run(asked, tmp_path, script, capsys):
    file = tmp_path / "two.yaml"
    OmegaConf.save(dataclasses.asdict(asked), file)
    results = f"results_dir={tmp_path / 'elsewhere'}"
    assert script([str(file), "--only", "LoRA", results, "--dry-run", "wandb.project=mine"]) == 0
    further, *jobs, last = capsys.readouterr().out.splitlines()
    assert len(jobs) == 2 and all(f"to do, {tmp_path}/elsewhere/mine_gsm8k/LoRA-kaiming-r8" in line for line in jobs)
    assert further == "LoRA: then the best point (further seeds: 1, runs without training: 2)"
    assert last == "to do: 3 runs with training and 2 without"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.yaml"], "error: no.yaml cannot be read"),
        (["two.yaml", "--only", "LoRa"], "error: --only=LoRa is not a method of this comparison; did you mean LoRA?"),
        (["two.yaml", "inti=default"], "error: unknown key inti; did you mean init?"),
        (["two.yaml", f"{RATE}=5e-5"], f"error: {RATE}=5e-5 has no effect: {RATE} is in the grid of "),
        (["two.yaml", "init=pissa"], "error: init=pissa has no effect on LoRA, which sets init: change it in the file"),
        (["two.yaml", "--runs", "a", "b"], "error: two.yaml is not used with --runs or --predictions"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_script_refuses_in_one_line(arguments, message, asked, tmp_path, script, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    OmegaConf.save(dataclasses.asdict(asked), "two.yaml")
    assert script([*arguments, "--output", "table"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(message) and not (tmp_path / "table").exists()
