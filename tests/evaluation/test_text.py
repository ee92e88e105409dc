"""The loss on a text: that of an independent loop over single tokens, whatever the batches, and all its inputs."""

import gzip
import json
import runpy
import sys
from math import log, sqrt

import pytest
import torch

from lora_one.adaptation.wrapping import wrap
from lora_one.errors import UsageError
from lora_one.evaluation import text
from lora_one.evaluation.command import main
from lora_one.evaluation.engines.local import Transformers
from lora_one.evaluation.loading import LoadedModel
from lora_one.evaluation.partial_results import PartialResults
from tests.helpers.models import bert_tokenizer, folder_of, random_bert, random_llama, random_t5
from tests.helpers.paths import ROOT
from tests.helpers.runs import run_config

TEXTS = ["One sentence.", "", "Über größere 漢字 and a 🙂, at some length, 1 2 3 4 5 6 7 8 9 10.", "x\r\ny\n\nz " * 12]


@torch.no_grad()
def slowly(model, tokenizer, document, size):
    """Return -log p of each token after BOS and the earlier tokens of its window, one forward pass a token, in fp64."""
    ids, nats = tokenizer(document, add_special_tokens=False)["input_ids"], []
    for place, token in enumerate(ids):
        context = [tokenizer.bos_token_id, *ids[place - place % size : place]]
        logits = model(torch.tensor([context])).logits[0, -1].double()
        nats.append(float(logits.logsumexp(-1) - logits[token]))
    return nats


def evaluated(tmp_path, *options, name="out"):
    """Run the command; return metrics.json and the lines of predictions.jsonl."""
    output = tmp_path / name
    assert main("text", [*options, f"--output_dir={output}"]) == 0
    report = json.loads((output / "metrics.json").read_text())
    return report, [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": row, "other": row[:3]}) + "\n" for row in TEXTS))
    return file


@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("size", [1, 16, 256])
@pytest.mark.parametrize("name", ["tokenizer", "sentencepiece_tokenizer"])
def test_equals_a_loop_over_single_tokens(name, size, batch_size, request):
    tokenizer = request.getfixturevalue(name)
    model = random_llama(len(tokenizer))
    found = dict(text.losses_of(Transformers(LoadedModel(model, tokenizer, 16), batch_size), TEXTS, size, done=()))
    assert sorted(found) == [0, 1, 2, 3]
    for index, document in enumerate(TEXTS):
        nats, line = slowly(model, tokenizer, document, size), found[index]
        assert line["tokens"] == len(nats) and line["bytes"] == len(document.encode("utf-8"))
        parts = [nats[start : start + size] for start in range(0, len(nats), size)]
        assert [window["tokens"] for window in line["windows"]] == [len(part) for part in parts]
        for window, part in zip(line["windows"], parts, strict=True):
            assert window["loss"] == pytest.approx(sum(part) / len(part), rel=1e-5)
        assert line["loss"] == (pytest.approx(sum(nats) / len(nats), rel=1e-5) if nats else None)


def test_metrics_are_sums_over_all_documents(tmp_path, llama_folder, tokenizer, table, capsys):
    report, lines = evaluated(tmp_path, f"--model_name={llama_folder}", f"--data_path={table}", "--max_length=16")
    model = random_llama(len(tokenizer))
    nats = [slowly(model, tokenizer, document, 16) for document in TEXTS]
    total, tokens = sum(map(sum, nats)), sum(map(len, nats))
    size = sum(len(document.encode()) for document in TEXTS)
    assert report["metrics"]["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert report["metrics"]["bits_per_byte"] == pytest.approx(total / log(2) / size, rel=1e-5)
    windows = sum(-(-len(part) // 16) for part in nats)
    assert report["counts"] == {"documents": 4, "windows": windows, "tokens": tokens, "bytes": size}
    assert report["remarks"] == {"empty": 1} and [line["id"] for line in lines] == [0, 1, 2, 3]
    assert report["units"]["loss"]["name"] == "nats" and not report["units"]["loss"]["higher"]
    said = capsys.readouterr().out
    assert f"text loss: {total / tokens:.4f} nats (standard error " in said and "%" not in said
    assert f"text bits_per_byte: {total / log(2) / size:.4f} bits per byte" in said
    # of a ratio of two sums, over the three documents with a token
    parts = [(sum(part), len(part)) for part in nats if part]
    residuals = [loss - total / tokens * count for loss, count in parts]
    error = sqrt(sum(value**2 for value in residuals) * 3 / 2) / tokens
    assert report["metrics"]["loss_stderr"] == pytest.approx(error, rel=1e-4)


def test_a_file_is_one_document_with_its_exact_bytes(tmp_path, llama_folder):
    plain, packed = tmp_path / "page.md", tmp_path / "packed.txt.gz"
    plain.write_bytes(b"\xef\xbb\xbf" + TEXTS[2].encode() + b"\r\nend\n")
    packed.write_bytes(gzip.compress(TEXTS[2].encode() + b"\r\nend\n"))
    (report, (line,)), (again, _) = (
        evaluated(
            tmp_path, f"--model_name={llama_folder}", f"--data_path={file}", "--max_length=8", name=f"{file.stem}-out"
        )
        for file in (plain, packed)
    )
    assert line["bytes"] == len(TEXTS[2].encode()) + 6 and report["metrics"] == again["metrics"]
    # one document: the error is over its windows, and the same share of both metrics
    metrics, windows = report["metrics"], line["windows"]
    residuals = [window["tokens"] * (window["loss"] - metrics["loss"]) for window in windows]
    error = sqrt(sum(value**2 for value in residuals) * len(windows) / (len(windows) - 1)) / line["tokens"]
    assert metrics["loss_stderr"] == pytest.approx(error)
    shares = [metrics[f"{name}_stderr"] / metrics[name] for name in ("loss", "bits_per_byte")]
    assert shares[0] == pytest.approx(shares[1])
    whole, _ = evaluated(tmp_path, f"--model_name={llama_folder}", f"--data_path={plain}", name="whole")
    assert whole["counts"]["windows"] == 1 and "loss_stderr" not in whole["metrics"], "a single window has no error"


def test_a_column_and_the_limit(tmp_path, llama_folder, table, capsys):
    options = [f"--model_name={llama_folder}", f"--data_path={table}", "--column=other"]
    report, lines = evaluated(tmp_path, *options, "--limit=3")
    assert [line["bytes"] for line in lines] == [3, 0, len("Übe".encode())]
    assert report["settings"]["column"] == "other" and "temperature" not in report["settings"]
    assert main("text", [*options[:2], "--column=others", f"--output_dir={tmp_path / 'no'}"]) == 2
    assert "has no column others; pass --column=<name>: did you mean other" in capsys.readouterr().err


def test_documents_of_data_sets(tmp_path):
    problems, chat, pairs = (tmp_path / name for name in ("test.jsonl", "chat.jsonl", "dev.tsv"))
    problems.write_text(json.dumps({"question": "1 + 1?", "answer": "2 #### 2"}) + "\n")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chat.write_text(json.dumps({"messages": turns}) + "\n")
    pairs.write_text("sentence\tlabel\ngood film\t1\n")
    found = {
        name: text.documents_of(text.TextOptions(model_name="m", dataset=name, data_path=str(path)))
        for name, path in (("gsm8k", problems), ("chat", chat), ("sst2", pairs))
    }
    assert found["gsm8k"] == ["Q: 1 + 1?\nA: 2 #### 2"] and found["chat"] == ["Hi\nHello"]
    assert "good film" in found["sst2"][0] and found["sst2"][0].endswith("positive")
    generated = text.documents_of(text.TextOptions(model_name="m", dataset="arithmetic"))
    assert len(generated) == 4500 and all(generated)


def test_interrupted_and_resumed_it_gives_the_same_digits(tmp_path, llama_folder, table, monkeypatch):
    monkeypatch.setattr(text, "GROUP", 2)
    options = [f"--model_name={llama_folder}", f"--data_path={table}", "--max_length=16", "--batch_size=3"]
    _, whole = evaluated(tmp_path, *options)
    add = PartialResults.add

    def stop_after_two(self, request, completion):
        add(self, request, completion)
        if len(self.path.read_text().splitlines()) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialResults, "add", stop_after_two)
        assert main("text", [*options, f"--output_dir={tmp_path / 'stopped'}"]) == 130
    _, resumed = evaluated(tmp_path, *options, name="stopped")
    assert resumed == whole


def test_documents_of_similar_length_share_a_group():
    windows = [[[0] * 5], [[0] * 9] * 3, [], [[0] * 7]]
    assert list(text.groups_of(windows)) == [[1, 3, 0, 2]]
    many = [[[0]]] * (2 * text.GROUP + 1)
    assert [len(group) for group in text.groups_of(many)] == [text.GROUP, text.GROUP, 1]


def test_an_unmerged_adapter_is_evaluated_with_its_base(tmp_path, llama_folder, tokenizer, table):
    model = wrap(random_llama(len(tokenizer)), run_config("init=lora").peft, "fp32").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    model.peft_config["default"].base_model_name_or_path = str(llama_folder)
    model.save_pretrained(tmp_path / "adapter")
    report, _ = evaluated(tmp_path, f"--adapter={tmp_path / 'adapter'}", f"--data_path={table}")
    nats = [loss for document in TEXTS for loss in slowly(model, tokenizer, document, 256)]
    assert report["metrics"]["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)


class NoBos:
    eos_token_id, bos_token_id = 7, None


def test_the_token_before_a_window(tokenizer):
    assert text.first_token(tokenizer) == tokenizer.bos_token_id != tokenizer.eos_token_id
    assert text.first_token(NoBos()) == 7
    with pytest.raises(UsageError, match="neither a BOS nor an EOS"):
        text.first_token(type("Neither", (), {"eos_token_id": None, "bos_token_id": None})())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is no text: pass --data_path="),
        (["--dataset=gsm9k"], "--dataset=gsm9k is not a data set: did you mean gsm8k"),
        (["--dataset=json"], "--dataset=json needs a local file: add --data_path="),
        (["--dataset=arithmetic", "--column=a"], "--column=a has no effect with --dataset"),
        (["--data_path={table}", "--max_length=0"], "--max_length=0 must be at least 1"),
        (["--data_path={table}", "--max_length=257"], "--max_length=257 exceeds the model's context of 256 tokens"),
        (["--data_path={table}", "--limit=1", "--column=none"], "has no column none"),
    ],
)
def test_wrong_options_are_named(options, message, tmp_path, llama_folder, table, capsys):
    given = [option.format(table=table) for option in options]
    assert main("text", [f"--model_name={llama_folder}", *given, f"--output_dir={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--temperature=1", "--rescore=x", "--max_new_tokens=4"])
def test_options_of_generated_text_do_not_exist(option, llama_folder, table, capsys):
    with pytest.raises(SystemExit):
        main("text", [f"--model_name={llama_folder}", f"--data_path={table}", option])
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


def test_texts_without_a_loss_are_refused(tmp_path, llama_folder, table, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    for file, options, message in (
        ("empty.txt", [], "contains no text"),
        ("latin.txt", [], "cannot be read as text in UTF-8"),
    ):
        given = [f"--model_name={llama_folder}", f"--data_path={tmp_path / file}", *options]
        assert main("text", [*given, f"--output_dir={tmp_path / 'out'}"]) == 1
        assert message in capsys.readouterr().err


def test_other_kinds_of_models_are_refused(tmp_path, tokenizer, table, capsys):
    t5 = folder_of(random_t5(len(tokenizer)), tokenizer, tmp_path / "t5")
    bert = folder_of(random_bert(), bert_tokenizer(), tmp_path / "bert")
    for model, message in ((t5, "need a causal model (model.type=CausalLM)"), (bert, "has a classification head")):
        options = [f"--model_name={model}", f"--data_path={table}", f"--output_dir={tmp_path / 'out'}"]
        assert main("text", options) == 2
        assert message in capsys.readouterr().err


def test_the_script(tmp_path, llama_folder, table, monkeypatch, capsys):
    options = [f"--model_name={llama_folder}", f"--data_path={table}"]
    monkeypatch.setattr(sys, "argv", ["eval_text.py", *options])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "eval/eval_text.py"), run_name="__main__")
    assert stop.value.code == 0
    assert len(list((tmp_path / "eval_results").glob("*/text/texts/metrics.json"))) == 1
