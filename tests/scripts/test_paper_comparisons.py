"""Each published table as a file: its header is complete, its real configuration valid, and its small trial runs."""

import os
import re

import pytest

from lora_one.runs import compare_command
from lora_one.runs.comparison_file import read_comparisons
from lora_one.runs.comparison_scores import none_is_run
from lora_one.runs.composition import compose
from tests.helpers.paths import ROOT, SHARED, real_model, shared

FILES = sorted((ROOT / "scripts/comparisons/paper").glob("*.yaml"))
FIELDS = ("Paper", "Table", "Seeds", "Hardware", "Hours", "Here", "Needs", "Differences", "Status")
IN_EVERY_RUN = FILES[[file.stem for file in FILES].index("lora_one_gsm8k")]  # of test-slow; the others in test-long
OTHERS = [file for file in FILES if file != IN_EVERY_RUN]
EXPERIMENTS = sorted((ROOT / "conf/experiment").glob("*.yaml"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def comment_of(file):
    """The comment at the top of a file."""
    return re.match(r"(?:#.*\n)+", file.read_text())[0]


def header(file):
    """Field -> text of the comment at the top of a file."""
    comment = comment_of(file)
    lines = [line.removeprefix("#").strip() for line in comment.splitlines()]
    found, name = {}, None
    for line in lines:
        field, colon, rest = line.partition(": ")
        if colon and field.isalpha():
            name, line = field, rest
        found[name] = f"{found.get(name, '')} {line}".strip()
    return found


@every_file
def test_the_header_says_what_is_known(file):
    found = header(file)
    assert set(FIELDS) <= found.keys() and all(found[field] for field in FIELDS)
    assert f"python scripts/compare.py scripts/comparisons/paper/{file.name}" in found["Status"]
    assert all(len(line) <= 125 for line in file.read_text().splitlines() if line.startswith("#"))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_the_header_of_an_experiment(file):
    """Paper, published numbers, seeds, hardware, hours, and its comparison; or that it is not from a paper."""
    comment = comment_of(file)
    assert all(len(line) <= 125 for line in comment.splitlines())
    assert f"python run_exp.py experiment={file.stem} " in comment
    if "not from a paper" in comment.lower():
        return
    assert all(re.search(rf"{word}.*\w", comment) for word in ("arXiv:", "Published", "Seeds:", "Hardware:", "Hours:"))
    comparison = ROOT / re.search(r"Comparison: (\S+)", comment)[1]
    assert comparison in FILES
    settings = [file.stem, *re.findall(r"^  - (\w+)$", file.read_text(), re.MULTILINE)]
    assert any(f"- experiment={name}\n" in comparison.read_text() for name in settings)


@every_file
def test_the_setting_of_a_comparison_is_an_experiment_that_names_it_or_another_one_of_its_table(file):
    (name,) = re.findall(r"^  - experiment=(\w+)$", file.read_text(), re.MULTILINE)
    experiment = next(path for path in EXPERIMENTS if path.stem == name)
    (paper,) = re.findall(r"arXiv:[\d.]+", comment_of(file))
    assert paper in comment_of(experiment)


def test_the_experiment_of_one_step_is_the_full_gradient_of_its_comparison():
    file = ROOT / "scripts/comparisons/paper/lora_one_one_step.yaml"
    task = read_comparisons(file)["MRPC"]
    compared = compose([*task.common, *task.methods["full gradient"]])
    alone = compose(["experiment=lora_one_one_step", "dataset=mrpc", "dataset.validation_size=400"])
    assert alone == compared and alone.init.bsz * alone.init.iters == 2048


@every_file
def test_the_number_of_runs_in_the_header(file):
    """Tuning runs, rounds of refinement included, and reported ones; not the starts of these, which are not trained."""
    total = 0
    for comparison in read_comparisons(file).values():
        for method in () if none_is_run(comparison.evaluations) else comparison.methods:
            points = 1
            for values in comparison.grid_of(method).values():
                points *= len(values)
            total += len(comparison.tuning_seeds) * (points + 2 * comparison.refine) + len(comparison.seeds)
    assert re.search(rf"= {total} runs", header(file)["Here"])


@every_file
def test_published_values_have_a_source_and_every_task_has_some(file):
    for comparison in read_comparisons(file).values():
        assert comparison.published.source and comparison.published.values
        assert set(comparison.published.values) == set(comparison.evaluations)
        for values in comparison.published.values.values():
            assert set(values) == {*comparison.methods, *comparison.not_run}, "a value that is not found says so"


def local_data(file, folder):
    """The override that names the training file, where it is not on the hub."""
    if "dataset.path=<" not in header(file)["Needs"]:
        return []
    (folder / "train.json").write_text("[]")
    return [f"dataset.path={folder / 'train.json'}"]


def dry_run(file, folder, monkeypatch, *arguments):
    """The exit code of a dry run without a network, in an empty folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder)
    return compare_command.main([str(file), "--dry-run", *local_data(file, folder), *arguments])


@every_file
def test_dry_run_of_the_real_configuration(file, tmp_path, monkeypatch, capsys):
    """Nothing is loaded, and no run is invalid; of several tasks the first one, and what the others have in common."""
    name, *others = tasks = read_comparisons(file)
    assert dry_run(file, tmp_path, monkeypatch, *([f"--task={name}"] if name else [])) == 0
    said = capsys.readouterr().out
    assert "cannot run" not in said and not list(tmp_path.glob("results"))
    assert re.search(r"^to do: \d+ runs with training", said, re.MULTILINE)
    assert all(f"\n{method}" in f"\n{said}" for method in tasks[name].methods)
    for other in others:
        assert compose(tasks[other].common).dataset.name != "arithmetic"


@pytest.mark.slow
@every_file
def test_dry_run_of_every_task(file, tmp_path, monkeypatch, capsys):
    assert dry_run(file, tmp_path, monkeypatch) == 0
    said = capsys.readouterr().out
    absent = [none_is_run(comparison.evaluations) for comparison in read_comparisons(file).values()]
    assert "cannot run" not in said and said.count("\nto do: ") == absent.count(False)
    assert said.count(": not run yet: ") == absent.count(True)


def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    file = ROOT / "scripts/comparisons/paper/lora_one_commonsense.yaml"
    assert compare_command.main([str(file), "--dry-run"]) == 2
    assert "is not on the hub: add dataset.path=<commonsense_170k.json" in capsys.readouterr().err


def small_overrides(file):
    """The real model that a small trial names by a path of the machine."""
    if "real_models/minilm-l6" not in file.read_text():
        return []
    return [f"model.name={real_model('minilm-l6')}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", [IN_EVERY_RUN, *(pytest.param(file, marks=pytest.mark.long) for file in OTHERS)], ids=lambda file: file.stem
)
def test_the_small_trial_runs_from_end_to_end(file, tmp_path, monkeypatch, capfd, request):
    if "humaneval" in file.read_text():
        request.getfixturevalue("isolated")
    shared("models/stories260K-hf")
    monkeypatch.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command = [str(file), "--small", "--output", str(tmp_path / "out"), f"results_dir={tmp_path / 'results'}"]
    assert compare_command.main([*command, *small_overrides(file)]) == 0, capfd.readouterr().err[-3000:]
    report = (tmp_path / "out/report.md").read_text()
    for comparison in read_comparisons(file, small=True).values():
        assert comparison.title in report
        assert f"Published: {comparison.published.source}" in report
        for values in comparison.published.values.values():
            assert all(str(value) in report for value in values.values())
        for method in comparison.methods:
            rows = re.findall(rf"^\| {re.escape(method)} +\|.*$", report, re.MULTILINE)
            assert rows and not any("failed" in row for row in rows)
    assert "Failed runs" not in report and SHARED.exists()
