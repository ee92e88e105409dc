"""The protocol lm_eval of the commonsense sets: log-likelihoods, choices, scores, resuming, and mistakes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lora_one.evaluation.command import main
from lora_one.evaluation.commonsense_choices import TASKS, examples_of
from lora_one.evaluation.commonsense_likelihood import questions_of
from lora_one.evaluation.partial_results import PartialResults
from tests.helpers.commonsense import ROWS
from tests.helpers.models import random_llama
from tests.helpers.paths import ROOT

NAMES = [f"Name{number}" * (1 + number % 3) for number in range(7)]
CONTEXT = 96


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven questions of each set, of different lengths; piqa has a training file."""
    folder = tmp_path_factory.mktemp("commonsense")
    for name, (instruction, answer, _) in ROWS.items():
        (folder / name).mkdir()
        opening, colon, rest = instruction.partition(": ")
        rows = [{"instruction": f"{opening}{colon}{word} {rest}", "answer": answer} for word in NAMES]
        (folder / name / "test.json").write_text(json.dumps(rows))
    (folder / "piqa" / "train.json").write_text(json.dumps(rows_of(folder, "piqa")[:3]))
    return folder


def rows_of(folder, name):
    return json.loads((folder / name / "test.json").read_text())


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "random"
    model_of(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_of(tokenizer):
    return random_llama(len(tokenizer), max_position_embeddings=CONTEXT)


def evaluate(model_folder, data, output, *more):
    common = [f"--model_name={model_folder}", f"--data_path={data}", f"--output_dir={output}", "--protocol=lm_eval"]
    assert main("commonsense", [*common, f"--dataset={','.join(ROWS)}", *more]) == 0
    return (output / "predictions.jsonl").read_text()


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def slow_log_p(model, tokenizer, context, continuation):
    """Log p of the tokens of the whole text beyond those of the context, in the last CONTEXT + 1 tokens of the text."""
    before, whole = tokenizer(context)["input_ids"], tokenizer(f"{context} {continuation}")["input_ids"]
    cut = max(0, len(whole) - CONTEXT - 1)
    log_p = model(torch.tensor([whole[cut:]])).logits[0].log_softmax(-1)
    return sum(float(log_p[place - cut - 1, whole[place]]) for place in range(len(before), len(whole)))


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_against_the_model_on_each_text_alone(num_fewshot, tmp_path, model_folder, data, tokenizer):
    """Some texts are longer than the model's context after two solved examples, and lose their first tokens."""
    lines = lines_of(evaluate(model_folder, data, tmp_path, f"--num_fewshot={num_fewshot}"))
    model, cut = model_of(tokenizer), 0
    by_id = {example.id: example for name in ROWS for example in examples_of(data / name, name, num_fewshot)}
    assert [line["id"] for line in lines] == list(by_id)
    for line in lines:
        example = by_id[line["id"]]
        asked = example.choice
        pairs = [(example.shots + text, after) for text, after in zip(asked.contexts, asked.continuations, strict=True)]
        values = [slow_log_p(model, tokenizer, *pair) for pair in pairs]
        assert list(line["log_likelihoods"].values()) == pytest.approx(values, abs=1e-4)
        best = max(range(len(values)), key=values.__getitem__)
        assert line["correct"] == (best == asked.gold) and line["prediction"] == example.words[best]
        if "correct_norm" in line:
            best = max(range(len(values)), key=lambda place: values[place] / len(asked.options[place]))
            assert line["correct_norm"] == (best == asked.gold) and line["prediction_norm"] == example.words[best]
        lengths = [len(tokenizer(f"{text} {after}")["input_ids"]) for text, after in pairs]
        assert line.get("tokens_cut", 0) == max(0, max(lengths) - CONTEXT - 1)
        cut += "tokens_cut" in line
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["remarks"] == {"not_comparable": 7 - num_fewshot} | ({"questions_cut": cut} if cut else {})
    assert (cut > 0) == (num_fewshot > 0) and cut < len(lines)


def test_metrics_are_lm_eval_s(tmp_path, model_folder, data):
    """The normalised score has no overall value where a set has none; the published comparison is left out."""
    lines = lines_of(evaluate(model_folder, data, tmp_path, "--num_fewshot=1"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    normalised = {"piqa", "hellaswag", "ARC-Easy", "openbookqa"}
    names = {name for name in metrics if not name.endswith("_stderr")}
    expected = {"accuracy", "accuracy/mean", *(f"accuracy/{name}" for name in ROWS)}
    assert names == expected | {f"accuracy_norm/{name}" for name in normalised}
    for name in normalised:
        hits = [line["correct_norm"] for line in lines if line["id"].startswith(f"{name}/")]
        assert len(hits) == (7 if name == "piqa" else 6) and metrics[f"accuracy_norm/{name}"] == sum(hits) / len(hits)
    assert not any("correct_official" in line for line in lines)
    alone = ["--num_fewshot=1", "--dataset=piqa"]
    evaluate(model_folder, data, tmp_path / "alone", *alone)
    report = json.loads((tmp_path / "alone/metrics.json").read_text())
    assert {"accuracy", "accuracy_norm"} <= set(report["metrics"]) and "remarks" not in report
    assert (report["settings"]["protocol"], report["settings"]["num_fewshot"]) == ("lm_eval", 1)


def test_rescored_predictions_stay_the_same(tmp_path, model_folder, data):
    before = evaluate(model_folder, data, tmp_path, "--num_fewshot=1")
    file, again = tmp_path / "predictions.jsonl", tmp_path / "again"
    assert main("commonsense", [f"--rescore={file}", f"--output_dir={again}"]) == 0
    assert lines_of((again / "predictions.jsonl").read_text()) == lines_of(before)


@pytest.mark.parametrize("batch_size", ["1", "3", "100"])
def test_batch_sizes_and_limits_give_the_same_answers(batch_size, tmp_path, model_folder, data):
    """The limit counts scored questions in each set."""
    whole = lines_of(evaluate(model_folder, data, tmp_path / "whole", "--num_fewshot=1"))
    some = lines_of(
        evaluate(model_folder, data, tmp_path / "some", "--num_fewshot=1", "--limit=4", f"--batch_size={batch_size}")
    )
    by_id = {line["id"]: line for line in whole}
    assert len(some) == 4 * len(ROWS)
    for line in some:
        assert line["log_likelihoods"] == pytest.approx(by_id[line["id"]]["log_likelihoods"], abs=1e-4)


def test_interrupted_evaluation_resumes_with_the_same_result(tmp_path, model_folder, data, monkeypatch):
    """Also in winogrande, where the two options of a question have different contexts."""
    options = ["--num_fewshot=1", "--batch_size=1"]
    whole = evaluate(model_folder, data, tmp_path / "whole", *options)
    add = PartialResults.add

    def stop_after(self, request, completion):
        add(self, request, completion)
        if len(self.path.read_text().splitlines()) == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialResults, "add", stop_after)
        with pytest.raises(AssertionError):
            evaluate(model_folder, data, tmp_path / "stopped", *options)
    added = []
    monkeypatch.setattr(PartialResults, "add", lambda self, request, completion: added.append(request))
    assert evaluate(model_folder, data, tmp_path / "stopped", *options) == whole
    assert len(added) == len(set(added)) == len(whole.splitlines()) - 29, "what is finished is not computed again"


def test_several_processes_give_the_results_of_one(tmp_path, model_folder, data):
    """With these rows and this size of batches, the two options of winogrande are computed by different processes."""
    options = ["--dataset=winogrande,piqa", "--num_fewshot=1", "--batch_size=2"]
    one = evaluate(model_folder, data, tmp_path / "one", *options)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    common = [f"--model_name={model_folder}", f"--data_path={data}", f"--output_dir={tmp_path / 'two'}"]
    script = [str(ROOT / "eval/eval_commonsense.py"), *common, "--protocol=lm_eval", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two/predictions.jsonl").read_text() == one


def test_white_space_before_an_option_belongs_to_the_option(tmp_path, tokenizer):
    """As in lm_eval: a question that ends with spaces does not lose them, and they are scored."""
    rows = [{"instruction": ROWS["openbookqa"][0].replace("Fog is", "Fog is  "), "answer": "answer1"}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (example,) = examples_of(tmp_path, "openbookqa", 0)
    ((numbers, question),), cut = questions_of(tokenizer, example, CONTEXT)
    assert (numbers, cut) == ([0, 1], 0) and question.context == tokenizer("Fog is")["input_ids"]
    for answer, text in zip(question.answers, example.choice.options, strict=True):
        assert question.context + answer == tokenizer(f"Fog is   {text}")["input_ids"]


def test_every_set_has_a_task():
    assert set(TASKS) == {*ROWS, "ARC-Challenge"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--protocol=lmeval"], "--protocol=lmeval is not a protocol: did you mean lm_eval? valid: lm_eval, published"),
        (["--protocol=lm_eval", "--greedy"], "--greedy has no effect with --protocol=lm_eval"),
        (["--protocol=lm_eval", "--likelihood"], "--likelihood has no effect with --protocol=lm_eval"),
        (["--protocol=lm_eval", "--temperature=0.5"], "--temperature=0.5 has no effect with --protocol=lm_eval"),
        (["--protocol=lm_eval", "--max_new_tokens=8"], "--max_new_tokens=8 has no effect with --protocol=lm_eval"),
        (["--protocol=lm_eval", "--num_fewshot=-1"], "--num_fewshot=-1 must be at least 0"),
        (["--num_fewshot=5"], "--num_fewshot=5 needs --protocol=lm_eval"),
        (["--protocol=published", "--num_fewshot=0"], "--num_fewshot=0 needs --protocol=lm_eval"),
        (["--protocol=lm_eval", "--num_fewshot=7", "--dataset=boolq"], "--num_fewshot=7 exceeds the number of solved"),
        (["--protocol=lm_eval", "--num_fewshot=4", "--dataset=piqa"], "3 training rows: pass at most 3"),
    ],
)
def test_wrong_options_give_one_message_before_anything_is_loaded(options, words, tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_one.evaluation.loading.load_evaluated", lambda options: pytest.fail("loaded"))
    assert main("commonsense", ["--base_model=bundled/tiny", f"--data_path={data}", *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


def test_the_published_protocol_is_the_default(tmp_path, model_folder, data):
    """Named or not, the same results and settings, so results of earlier versions still count as finished."""
    found = []
    for name, more in (("named", ["--protocol=published"]), ("not", [])):
        common = [f"--model_name={model_folder}", f"--data_path={data}", f"--output_dir={tmp_path / name}"]
        assert main("commonsense", [*common, "--dataset=boolq", "--greedy", "--max_new_tokens=4", *more]) == 0
        report = json.loads((tmp_path / name / "metrics.json").read_text())
        found.append(((tmp_path / name / "predictions.jsonl").read_text(), report["settings"]))
    assert found[0] == found[1] and found[0][1]["protocol"] is None
