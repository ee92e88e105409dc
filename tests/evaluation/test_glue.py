"""GLUE: its metrics against scikit-learn, its answers against slow loops, on the real validation splits."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lora_one.errors import UsageError
from lora_one.evaluation import BENCHMARKS, class_choice, glue
from lora_one.evaluation.command import main
from lora_one.evaluation.partial_results import PartialResults
from tests.helpers.models import folder_of, random_llama, random_roberta, random_t5
from tests.helpers.paths import shared
from tests.helpers.runs import finish, run_config


def lines_of(output):
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


def report_of(output):
    return json.loads((output / "metrics.json").read_text())


@pytest.mark.parametrize(("name", "folder", "size"), [("cola", "CoLA", 1043), ("mrpc", "MRPC", 408)])
def test_a_head_on_a_whole_validation_split(name, folder, size, tokenizer, tmp_path):
    """Batches against one text at a time through transformers alone; the metrics against scikit-learn."""
    data = shared(f"data/glue/{folder}")
    torch.manual_seed(3)
    base = folder_of(random_roberta(len(tokenizer)), tokenizer, tmp_path / "base")
    options = ["--dataset", name, "--model_name", str(base), "--data_path", str(data), "--max_length", "62"]
    assert main("glue", [*options, "--output_dir", str(tmp_path / "out"), "--batch_size", "32"]) == 0
    lines, report = lines_of(tmp_path / "out"), report_of(tmp_path / "out")
    assert report["counts"]["total"] == len(lines) == size and report["counts"]["unparsed"] == 0
    model, examples = random_roberta(len(tokenizer)), glue.validation_rows(str(data), name)
    words = glue.SETS[name].labels
    with torch.no_grad():
        for line, example in list(zip(lines, examples, strict=True))[::17]:
            inputs = tokenizer(*example.texts, return_tensors="pt", truncation=True, max_length=62)
            inputs.pop("token_type_ids", None)
            assert line["prediction"] == words[int(model(**inputs).logits.argmax())], line["id"]
            assert line["correct"] == (line["prediction"] == example.gold)
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not here: pip install -e .[dev]")
    truth, said = ([line[field] for line in lines] for field in ("gold", "prediction"))
    assert report["metrics"]["accuracy"] == pytest.approx(metrics.accuracy_score(truth, said))
    if name == "cola":
        assert report["metrics"]["matthews"] == pytest.approx(metrics.matthews_corrcoef(truth, said))
        assert report["units"]["matthews"]["bounds"] == [-1.0, 1.0], "not a share"
    else:
        assert report["metrics"]["f1"] == pytest.approx(metrics.f1_score(truth, said, pos_label="equivalent"))
    assert all(f"{metric}_stderr" in report["metrics"] for metric in report["metrics"] if "stderr" not in metric)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_batches_give_the_same_text_and_first_tokens_as_single_prompts(kind, tokenizer, tmp_path):
    data = shared("data/glue/SST-2")
    model = random_t5(len(tokenizer), initializer_factor=3.0) if kind == "t5" else random_llama(len(tokenizer))
    base = folder_of(model, tokenizer, tmp_path / "base")
    options = ["--dataset", "sst2", "--model_name", str(base), "--data_path", str(data), "--limit", "24"]
    options += ["--first_token", "--max_new_tokens", "5"]
    outputs = []
    for size in ("1", "7"):
        assert main("glue", [*options, "--output_dir", str(tmp_path / size), "--batch_size", size]) == 0
        outputs.append(lines_of(tmp_path / size))
    assert outputs[0] == outputs[1]
    assert len({line["prediction_first_token"] for line in outputs[0]}) == 2, "the comparison must not be constant"
    words = ("negative", "positive")
    for line in outputs[0]:
        ids = tokenizer(line["prompt"], return_tensors="pt")["input_ids"]
        if kind == "t5":
            ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        with torch.no_grad():
            row = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, **ends)[0].tolist()
            if kind == "t5":
                bos = tokenizer.bos_token_id  # this tokenizer puts one in front of a word
                logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[0, bos]])).logits[0, -1]
                first = [tokenizer(word)["input_ids"][1] for word in words]
            else:
                logits = model(input_ids=ids).logits[0, -1]
                first = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
        written = row[1:] if kind == "t5" else row[ids.shape[1] :]
        assert line["completion"] == tokenizer.decode(written, skip_special_tokens=True)
        assert line["prediction_first_token"] == words[int(logits[first].argmax())]
    assert {"accuracy", "accuracy_first_token"} <= report_of(tmp_path / "7")["metrics"].keys()


def test_published_comparison_considers_all_three_words(tokenizer, tmp_path):
    """MNLI, with a file in which one label alone occurs: each of the three words can win."""
    model = random_llama(len(tokenizer), initializer_range=0.5)
    base = folder_of(model, tokenizer, tmp_path / "base")
    rows = [f"premise {number} of {number * number}\tit {number}\tneutral\n" for number in range(40)]
    (tmp_path / "dev_matched.tsv").write_text("".join(["sentence1\tsentence2\tgold_label\n", *rows]))
    options = ["--dataset", "mnli", "--model_name", str(base), "--data_path", str(tmp_path), "--first_token"]
    assert main("glue", [*options, "--max_new_tokens", "1", "--output_dir", str(tmp_path / "out")]) == 0
    words = glue.SETS["mnli"].labels
    first = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    lines = lines_of(tmp_path / "out")
    for line in lines:
        with torch.no_grad():
            logits = model(input_ids=tokenizer(line["prompt"], return_tensors="pt")["input_ids"]).logits[0, -1]
        assert line["prediction_first_token"] == words[int(logits[first].argmax())]
        assert line["correct_first_token"] == (line["prediction_first_token"] == "neutral")
    assert len({line["prediction_first_token"] for line in lines}) == 3


def test_answer_is_matched_by_the_word_of_its_class():
    line = BENCHMARKS["glue"].score("rte/3", "p", " not_entailment\n", "not_entailment")
    assert line["correct"] and line["prediction"] == "not_entailment"
    assert BENCHMARKS["glue"].score("rte/3", "p", "entailment because", "entailment")["prediction"] is None
    assert not BENCHMARKS["glue"].score("cola/0", "p", "acceptable", "unacceptable")["correct"]


@pytest.mark.parametrize(
    ("dataset", "names", "words"),
    [
        ("cola", ["acceptable", "unacceptable"], ["acceptable", "unacceptable"]),
        ("cola", ["LABEL_0", "LABEL_1"], ["unacceptable", "acceptable"]),
        # as the checkpoints of MNLI on the hub name them, in an order of their own
        ("mnli", ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], ["contradiction", "neutral", "entailment"]),
    ],
)
def test_head_outputs_are_matched_by_label_name(dataset, names, words):
    assert class_choice.words_of(names, glue.SETS[dataset].labels) == words


@pytest.mark.parametrize("names", [["negative", "positive"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_head_of_another_task_is_refused_before_loading(names, tokenizer, tmp_path, capsys):
    model = random_roberta(len(tokenizer), labels=len(names))
    model.config.id2label = dict(enumerate(names))
    base = folder_of(model, tokenizer, tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"")
    assert main("glue", ["--dataset=cola", f"--model_name={base}", f"--output_dir={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert f"trained for another task: its {len(names)} outputs are {', '.join(names)}" in said
    assert "acceptable" in said and not (tmp_path / "out").exists()


def test_head_may_have_the_label_names_of_the_hub(tokenizer, tmp_path):
    model = random_roberta(len(tokenizer))
    model.config.id2label = {0: "equivalent", 1: "not_equivalent"}
    base = folder_of(model, tokenizer, tmp_path / "base")
    options = glue.GlueOptions(model_name=str(base), dataset="mrpc")
    assert glue.Glue().check(options).labels == ("equivalent", "different")


def test_adapter_of_a_run_has_the_labels_of_its_data_set(tmp_path):
    """MNLI and CB have the same classes in another order; SST-2 has others."""
    (tmp_path / "run.json").write_text(json.dumps({"config": {"dataset": {"name": "mnli"}}}))
    config = {"task_type": "SEQ_CLS", "base_model_name_or_path": "bundled/tiny"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    options = glue.GlueOptions(adapter=str(tmp_path / "adapter"), dataset="cb")
    assert glue.Glue().check(options).labels == glue.SETS["mnli"].labels
    with pytest.raises(UsageError, match="trained for another task"):
        glue.Glue().check(glue.GlueOptions(adapter=str(tmp_path / "adapter"), dataset="sst2"))


def test_head_input_is_cut_to_its_positions_and_reported(tokenizer, tmp_path):
    """64 positions, although --max_length is 512 by default."""
    base = folder_of(random_roberta(len(tokenizer)), tokenizer, tmp_path / "base")
    rows = [f"{'word ' * words}\t{words % 2}\n" for words in (3, 200, 5, 90)]
    (tmp_path / "dev.tsv").write_text("".join(["sentence\tlabel\n", *rows]))
    options = ["--dataset", "sst2", "--model_name", str(base), "--data_path", str(tmp_path / "dev.tsv")]
    assert main("glue", [*options, "--output_dir", str(tmp_path / "all")]) == 0
    assert main("glue", [*options, "--output_dir", str(tmp_path / "64"), "--max_length", "64"]) == 0
    assert lines_of(tmp_path / "all") == lines_of(tmp_path / "64")
    assert ["shortened" in line for line in lines_of(tmp_path / "all")] == [False, True, False, True]
    assert report_of(tmp_path / "all")["remarks"] == {"texts_shortened": 2}


def test_a_prompt_beyond_the_context_has_no_first_token_to_compare(tokenizer, tmp_path):
    """For a model with learned positions; the other prompts are answered as usual."""
    settings = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), initializer_range=0.3, **settings)).eval()
    base = folder_of(model, tokenizer, tmp_path / "base")
    whole = len(tokenizer(glue.SETS["sst2"].prompt.format(sentence=""))["input_ids"])
    rows = [f"{'a' * (64 - whole + more)}\t1\n" for more in (-2, -1, 0, 1, 60)]
    (tmp_path / "dev.tsv").write_text("".join(["sentence\tlabel\n", *rows]))
    options = ["--dataset", "sst2", "--model_name", str(base), "--data_path", str(tmp_path / "dev.tsv")]
    assert main("glue", [*options, "--first_token", "--output_dir", str(tmp_path / "out")]) == 0
    lines = lines_of(tmp_path / "out")
    lengths = [len(tokenizer(line["prompt"])["input_ids"]) for line in lines]
    assert min(lengths) < 64 <= max(lengths) and 63 in lengths, "the edge itself is among them"
    assert [line["prediction_first_token"] is not None for line in lines] == [length < 64 for length in lengths]
    assert not any(line["correct_first_token"] for line in lines if line["prediction_first_token"] is None)
    first = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("negative", "positive")]
    for line in lines:
        if line["prediction_first_token"] is not None:
            with torch.no_grad():
                logits = model(input_ids=tokenizer(line["prompt"], return_tensors="pt")["input_ids"]).logits[0, -1]
            assert line["prediction_first_token"] == ("negative", "positive")[int(logits[first].argmax())]


@pytest.mark.parametrize(
    ("kind", "option", "reader"),
    [
        ("roberta", ["--first_token"], "--first_token=True applies only to a model that generates text"),
        ("roberta", ["--max_new_tokens", "3"], "--max_new_tokens=3 applies only to a model that generates text"),
        ("t5", ["--max_length", "64"], "--max_length=64 applies only to a classification head"),
    ],
)
def test_rejects_options_without_effect_for_the_model_type(kind, option, reader, tokenizer, tmp_path, capsys):
    model = random_t5(len(tokenizer)) if kind == "t5" else random_roberta(len(tokenizer))
    base = folder_of(model, tokenizer, tmp_path / "base")
    data = rows_of_sst2(tmp_path / "sst2")
    options = ["--dataset", "sst2", "--model_name", str(base), "--data_path", str(data)]
    assert main("glue", [*options, *option, "--output_dir", str(tmp_path / "out")]) == 2
    assert reader in capsys.readouterr().err


def rows_of_sst2(place):
    place.mkdir()
    for split in ("train", "dev"):
        rows = [f"film number {i} is {'fine' if i % 3 else 'dull'}\t{int(i % 3 > 0)}" for i in range(30)]
        (place / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return place


def test_adapter_equals_its_merged_checkpoint_and_evaluation_resumes(tokenizer, tmp_path, monkeypatch):
    data = rows_of_sst2(tmp_path / "sst2")
    base = folder_of(random_llama(len(tokenizer)), tokenizer, tmp_path / "base")
    sizes = ("model.epochs=3", "model.per_device_batch_size=5", "model.real_batch_size=10", "model.learning_rate=1e-2")
    run = run_config(
        f"results_dir={tmp_path}",
        "dataset=sst2",
        f"dataset.path={data}",
        "model=roberta_large",
        f"model.name={base}",
        "model.saving=true",
        "peft.lora_r=2",
        *sizes,
    )
    folder = finish(run)
    final = folder.read()["evaluation"]["final"]
    options = ["--dataset", "sst2", "--data_path", str(data), "--batch_size", "4"]
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    assert main("glue", [*options, "--model_name", str(folder.merged), "--output_dir", str(merged)]) == 0
    seen = []
    add = PartialResults.add

    def interrupted(kept, request, completion):
        if len(seen) == 11:
            raise KeyboardInterrupt
        seen.append(request)
        add(kept, request, completion)

    monkeypatch.setattr(PartialResults, "add", interrupted)
    again = [*options, "--adapter", str(folder.adapter), "--output_dir", str(adapter)]
    assert main("glue", again) == 130
    monkeypatch.setattr(PartialResults, "add", lambda *given: seen.append(given[1]) or add(*given))
    assert main("glue", again) == 0
    assert len(seen) == len(set(seen)) == 30, "what was there is not asked again"
    assert lines_of(adapter) == lines_of(merged)
    assert report_of(adapter)["metrics"]["accuracy"] == pytest.approx(final["eval_accuracy"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "stsb"], "--dataset=stsb is not a set of GLUE"),
        (["--dataset", "cola", "--temperature", "0.5"], "--temperature=0.5 has no effect"),
        (["--dataset", "cola", "--max_length", "1"], "must be at least 2 tokens"),
        (["--dataset", "mnli"], "its 2 outputs are LABEL_0, LABEL_1, but this set has the 3 classes"),
    ],
)
def test_wrong_use_gives_one_line(options, message, tokenizer, tmp_path, capsys):
    base = folder_of(random_roberta(len(tokenizer)), tokenizer, tmp_path / "base")
    (tmp_path / "dev_matched.tsv").write_text("sentence1\tsentence2\tgold_label\na\tb\tneutral\n")
    options = [*options, "--data_path", str(tmp_path / "dev_matched.tsv"), "--output_dir", str(tmp_path / "out")]
    assert main("glue", [*options, "--model_name", str(base)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
