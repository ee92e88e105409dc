"""Wrong evaluations: one line on stderr that names the value, the rule and the way out, and an exit code."""

import json

import pytest

from lora_one.evaluation.command import main as evaluate
from lora_one.evaluation.functional_correctness import main as score_samples
from tests.helpers.bad_input import FAILURE, USAGE, is_one_line

EVAL = "--data_path={files}/gsm8k.jsonl --output_dir={results}"

EVALUATION = [
    ("", USAGE, "nothing to evaluate", "--model_name="),
    ("--model_name=bundled/tiny --limit=0", USAGE, "--limit=0 must be at least 1"),
    ("--model_name=bundled/tiny --temperature=0", USAGE, "--temperature=0.0 must be a positive number", "leave it out"),
    ("--model_name=bundled/tiny --top_p=0.5", USAGE, "--top_p=0.5", "needs --temperature"),
    ("--model_name=bundled/tiny --data_path={files}/no", USAGE, "--data_path=", "/no does not exist"),
    ("--adapter={files}/empty " + EVAL, USAGE, "/empty has no adapter_config.json", "adapter/ folder of a run"),
    ("--model_name={files}/nowhere " + EVAL, USAGE, "/nowhere: there is no such folder", "a hub id"),
    ("--model_name={files}/model.gguf " + EVAL, USAGE, "model.gguf: a single file", "model folder"),
    ("--model_name={files}/no-weights " + EVAL, USAGE, "/no-weights has a config.json but no weights", "download them"),
    (
        "--model_name={files}/grown --data_path={files}/word-gsm8k.jsonl --output_dir={results}",
        USAGE,
        "token id 425, but the model has only 425 embeddings",
        "resize_token_embeddings",
    ),
    ("--rescore={files}/random.jsonl", USAGE, "random.jsonl is not a text file", "predictions.jsonl"),
    ("--rescore={files}/empty", USAGE, "/empty is not a file", "predictions.jsonl"),
    (
        "--model_name=bundled/tiny --temperature=nan",
        USAGE,
        "--temperature=nan must be a positive number",
        "leave it out",
    ),
    (
        "--rescore={files}/gsm8k.jsonl",
        USAGE,
        "gsm8k.jsonl, line 1 is not a prediction of this benchmark (it has no id)",
        "required are id, prompt",
    ),
    (
        "--model_name=bundled/tiny --data_path={files}/json.jsonl",
        USAGE,
        "no column question, answer",
        "its columns are prompt",
    ),
    ("--model_name=bundled/tiny --data_path={files}/cut.jsonl.gz", FAILURE, "cannot be read as json", "check the file"),
]

MODEL = "--model_name=bundled/tiny --data_path={files}/problems.jsonl "
HUMANEVAL = [
    (MODEL + "--num_sample=0", USAGE, "--num_sample=0 must be at least 1", "leave it out"),
    (MODEL + "--timeout=0", USAGE, "--timeout=0.0 must be greater than 0", "the published limit is 3"),
    (MODEL + "--timeout=nan", USAGE, "--timeout=nan must be greater than 0"),
    (MODEL + "--memory_mb=8", USAGE, "--memory_mb=8 must be at least 64"),
    (MODEL + "--workers=0", USAGE, "--workers=0 must be at least 1", "leave it out"),
    ("--rescore={files}/json.jsonl --no_score", USAGE, "--no_score and --rescore exclude each other", "drop one"),
    ("--rescore={files}/json.jsonl --num_sample=2", USAGE, "--num_sample has no effect with --rescore", "leave it out"),
    (
        "--rescore={files}/json.jsonl --unsafe",
        USAGE,
        "json.jsonl, line 1 is not a prediction",
        "required are id, prompt",
    ),
    (
        "--model_name=bundled/tiny --data_path={files}/json.jsonl --unsafe",
        USAGE,
        "no column task_id",
        "its columns are prompt",
    ),
    ("--model_name=bundled/tiny --data_path={files}/twice.jsonl --unsafe", USAGE, "contains the task_id Mine/0 twice"),
]

PROBLEMS = "--data_path={files}/problems.jsonl "
SAMPLES = [
    (PROBLEMS + "--sample_file={files}/no.jsonl", USAGE, "--sample_file=", "/no.jsonl is not a file", "samples.jsonl"),
    (PROBLEMS + "--sample_file={files}/empty.jsonl", USAGE, "has no samples", "samples.jsonl"),
    (PROBLEMS + "--sample_file={files}/random.jsonl", FAILURE, "random.jsonl cannot be read", "samples.jsonl"),
    (PROBLEMS + "--sample_file={files}/cut.jsonl.gz", FAILURE, "cut.jsonl.gz cannot be read", "samples.jsonl"),
    (
        PROBLEMS + "--sample_file={files}/cut.jsonl",
        USAGE,
        "line 1 is not a sample (KeyError('task_id'))",
        "the texts task_id",
    ),
    (PROBLEMS + "--sample_file={files}/null.jsonl", USAGE, "line 2 is not a sample (not text)", "the texts task_id"),
    (
        PROBLEMS + "--sample_file={files}/hello.txt",
        USAGE,
        "line 1 is not a sample (JSONDecodeError",
        "the texts task_id",
    ),
    (
        PROBLEMS + "--sample_file={files}/one.jsonl",
        USAGE,
        "no sample for 1 of the 2 problems (Mine/1)",
        "--allow_missing",
    ),
    (
        PROBLEMS + "--sample_file={files}/unknown.jsonl",
        USAGE,
        "'Mine/7'",
        "not one of the 2 problems",
        "did you mean Mine/",
    ),
    (PROBLEMS + "--sample_file={files}/uneven.jsonl --k=2", USAGE, "--k=2 exceeds 1", "pass --k=1"),
    (PROBLEMS + "--sample_file={files}/uneven.jsonl --k=1,5", USAGE, "--k=5 exceeds 1", "pass --k=1"),
    (
        PROBLEMS + "--sample_file={files}/uneven.jsonl --k=0",
        USAGE,
        "--k=0 must be positive integers",
        "--k=1,10",
    ),
    (PROBLEMS + "--sample_file={files}/uneven.jsonl --k=a", USAGE, "--k=a must be positive integers", "--k=1,10"),
    (PROBLEMS + "--sample_file={files}/uneven.jsonl --timeout=-1", USAGE, "--timeout=-1.0 must be greater than 0"),
    ("--data_path={files}/no --sample_file={files}/one.jsonl", USAGE, "--data_path=", "/no does not exist"),
    (
        "--data_path={files}/json.jsonl --sample_file={files}/one.jsonl",
        USAGE,
        "no column task_id",
        "its columns are prompt",
    ),
    ("--sample_file={files}/one.jsonl", FAILURE, "openai/openai_humaneval cannot be loaded", "--data_path="),
]


@pytest.mark.parametrize(
    ("script", "line", "expected", "fragments"),
    [
        (script, *row[:2], row[2:])
        for script, rows in (("gsm8k", EVALUATION), ("humaneval", HUMANEVAL), ("samples", SAMPLES))
        for row in rows
    ],
    ids=lambda x: str(x)[:60],
)
def test_wrong_evaluation(script, line, expected, fragments, files, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arguments = line.format(files=files, results=tmp_path / "eval").split()
    code = score_samples(arguments) if script == "samples" else evaluate(script, arguments)
    is_one_line(capfd.readouterr().err.splitlines(), fragments, alone=False)
    assert code == expected and list(tmp_path.rglob("*")) == []


def test_an_evaluation_never_overwrites_the_results_of_another(files, tmp_path, capfd, no_weights):
    report = {"model": "another", "settings": {}, "provenance": {"fingerprints": {}}}
    (tmp_path / "metrics.json").write_text(json.dumps(report))
    (tmp_path / "predictions.jsonl").write_text("precious")
    options = ["--model_name=bundled/tiny", f"--data_path={files / 'gsm8k.jsonl'}", f"--output_dir={tmp_path}"]
    assert evaluate("gsm8k", options) == USAGE
    is_one_line(capfd.readouterr().err.splitlines(), ("another model or other settings", "--overwrite"), alone=True)
    assert json.loads((tmp_path / "metrics.json").read_text()) == report
    assert (tmp_path / "predictions.jsonl").read_text() == "precious"
