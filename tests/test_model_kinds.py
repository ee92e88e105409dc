"""Encoder-decoders and classification heads: encoded, differentiated, trained, saved and merged like causal models."""

import dataclasses
import json
import shutil

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from lora_one.adaptation import layers as adapters
from lora_one.data import load_dataset
from lora_one.data.encode import ClassEncoder, EncoderDecoderEncoder, batches_of, collate, pad_id_of
from lora_one.data.encoders import encoder_for
from lora_one.errors import RunError, UsageError
from lora_one.evaluation.held_out import HeldOut
from lora_one.initialization.given_batches import one_by_one
from lora_one.initialization.gradients import mean_gradients
from lora_one.losses import loss_count, loss_sum, mean_loss, model_logits, targets
from lora_one.models import kind_of, load_model, load_skeleton, load_tokenizer, padded_with
from lora_one.records.folder import RunFolder
from lora_one.runs.plan import plan
from lora_one.runs.saving import merge_run
from lora_one.types import Example
from tests.helpers.models import (
    bert_tokenizer,
    folder_of,
    random_bert,
    random_llama,
    random_reader_of_images,
    random_roberta,
    random_t5,
)
from tests.helpers.paths import shared
from tests.helpers.runs import finish, run_config, small_run

WORDS = ("unacceptable", "acceptable")
SENTENCES = ["the cat sat", "cat the sat on", "a dog ran far away", "ran", "they are here now"]
EXAMPLES = [
    Example(f"judge: {text}\nresult: ", WORDS[number % 2], gold=WORDS[number % 2], texts=(text,), label=number % 2)
    for number, text in enumerate(SENTENCES)
]


def test_an_encoder_decoder_s_padding_counts_nowhere_and_its_loss_is_the_model_s_own(tokenizer):
    """Defect 13 of the published code: it trained on the padding of T5's labels."""
    model = random_t5(len(tokenizer))
    encoder = EncoderDecoderEncoder(tokenizer, start=0)
    encoded, counts = encoder.encode(EXAMPLES, 64)
    assert (counts.whole, counts.dropped) == (5, 0)
    batch = collate(encoded, encoder.pad_id)
    assert bool((batch["labels"] == -100).any()), "the words have different lengths"
    for example, row in zip(EXAMPLES, encoded, strict=True):
        assert row.labels[-1] == tokenizer.eos_token_id == row.input_ids[-1]
        assert tokenizer.decode(row.labels, skip_special_tokens=True) == example.response
        assert row.decoder_ids == [0, *row.labels[:-1]]
    with torch.no_grad():
        own = [model(input_ids=torch.tensor([r.input_ids]), labels=torch.tensor([r.labels])).loss for r in encoded]
    by_example = mean_loss(model, [batch], "example")
    assert by_example == pytest.approx(float(torch.stack(own).mean()), rel=1e-5)
    tokens = torch.tensor([len(row.labels) for row in encoded])
    by_token = float((torch.stack(own) * tokens).sum() / tokens.sum())
    assert mean_loss(model, batches_of(encoded, 2, encoder.pad_id), "token") == pytest.approx(by_token, rel=1e-5)


def test_truncated_encoder_decoder_prompt_keeps_its_eos(tokenizer):
    encoder = EncoderDecoderEncoder(tokenizer, start=0)
    (row,), counts = encoder.encode([Example("a long prompt of many words", "and an answer")], 6)
    assert len(row.input_ids) == len(row.labels) == 6 and counts.shortened == 1
    assert row.input_ids[-1] == tokenizer.eos_token_id != row.labels[-1]
    assert encoder.encode([Example("a prompt", "")], 6)[1].dropped == 1


def test_a_head_s_loss_is_the_cross_entropy_of_its_classes(tokenizer):
    model = random_roberta(len(tokenizer))
    encoder = ClassEncoder(tokenizer)
    encoded, _ = encoder.encode(EXAMPLES, 64)
    batch = collate(encoded, 1)
    assert batch["labels"].tolist() == [0, 1, 0, 1, 0]
    logits = model_logits(model, batch)
    torch.testing.assert_close(loss_sum(logits, targets(batch), "token") / 5, cross_entropy(logits, batch["labels"]))
    assert loss_count(targets(batch), "example") == loss_count(targets(batch), "token") == 5
    alone = mean_loss(model, batches_of(encoded, 1, 1), "example")
    assert alone == pytest.approx(cross_entropy(logits, batch["labels"]).item(), rel=1e-5)


def test_two_texts_are_joined_as_the_tokenizer_does(tokenizer):
    pair = Example("", "", texts=("one text", "another"), label=1)
    more = Example("", "", texts=("one text", "an", "other"), label=0)
    (row, joined), _ = ClassEncoder(tokenizer).encode([pair, more], 64)
    assert row.input_ids == tokenizer("one text", "another")["input_ids"] and row.labels == 1
    assert joined.input_ids == tokenizer("one text", "an other")["input_ids"]
    (cut,), counts = ClassEncoder(tokenizer).encode([pair], 4)
    assert len(cut.input_ids) == 4 and counts.shortened == 1


def test_bert_reads_cls_a_sep_b_sep_with_a_type_for_each_text():
    """Without an end-of-sequence token; padding has type 0 and no attention."""
    tokenizer, model = bert_tokenizer(), random_bert(labels=3)
    assert tokenizer.eos_token_id is None
    pairs = [("sentence 1 2 good", "bad"), ("good", "bad 3")]
    examples = [Example("", "", texts=pair, label=place) for place, pair in enumerate(pairs)]
    encoded, _ = ClassEncoder(tokenizer).encode(examples, 64)
    read = tokenizer.convert_ids_to_tokens(encoded[0].input_ids)
    assert read == ["[CLS]", "sentence", "1", "2", "good", "[SEP]", "bad", "[SEP]"]
    assert encoded[0].token_types == [0, 0, 0, 0, 0, 0, 1, 1]
    batch = collate(encoded, ClassEncoder(tokenizer).pad_id)
    own = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    assert all(torch.equal(batch[name], own[name]) for name in own)
    with torch.no_grad():
        alone = [model(**tokenizer(*pair, return_tensors="pt")).logits[0] for pair in pairs]
        torch.testing.assert_close(model_logits(model, batch), torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_only_a_classification_head_needs_no_eos_token(tmp_path):
    folder = str(folder_of(random_bert(), bert_tokenizer(), tmp_path / "bert"))
    assert pad_id_of(load_tokenizer(folder, model_type="SequenceClassification")) == 0
    bare = bert_tokenizer()
    bare.pad_token = None
    assert pad_id_of(bare) == bare.sep_token_id
    for kind in ("CausalLM", "ConditionalGeneration"):
        with pytest.raises(RunError, match=f"no end-of-sequence token, which model.type={kind} needs"):
            load_tokenizer(folder, model_type=kind)


@pytest.mark.parametrize("kind", [EncoderDecoderEncoder, ClassEncoder])
def test_one_by_one_yields_each_example_without_padding(kind, tokenizer):
    encoder = kind(tokenizer)
    encoded, _ = encoder.encode(EXAMPLES, 64)
    shown = list(one_by_one(batches_of(encoded, 3, encoder.pad_id)))
    assert len(shown) == len(encoded)
    for found, row in zip(shown, encoded, strict=True):
        alone = collate([row], encoder.pad_id)
        assert found.keys() == alone.keys() and all(torch.equal(found[name], alone[name]) for name in alone)


@pytest.mark.parametrize("kind", ["ConditionalGeneration", "SequenceClassification"])
@pytest.mark.parametrize("hold", ["device", "layer"])
def test_gradients_are_autograd_s(tokenizer, kind, hold):
    if kind == "ConditionalGeneration":
        model, encoder = random_t5(len(tokenizer)), EncoderDecoderEncoder(tokenizer, start=0)
    else:
        model, encoder = random_roberta(len(tokenizer)), ClassEncoder(tokenizer)
    assert kind_of(model).name == kind
    encoded, _ = encoder.encode(EXAMPLES, 64)
    layers = adapters.target_layers(model, run_config("peft.lora_r=2").peft)
    found = {}
    batches = batches_of(encoded, 5 if hold == "layer" else 2, encoder.pad_id)
    report = mean_gradients(model, layers, batches, "example", lambda n, G: found.update({n: G.clone()}), place=hold)
    assert found.keys() == layers.keys() and report.examples == 5
    model.requires_grad_(True)
    for row in encoded:
        batch = collate([row], encoder.pad_id)
        (loss_sum(model_logits(model, batch), targets(batch), "example") / len(encoded)).backward()
    for name, layer in layers.items():
        torch.testing.assert_close(found[name], layer.weight.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_heads_and_the_output_layer_are_not_targets(tokenizer):
    settings = run_config("peft.lora_r=2").peft
    for model in (random_roberta(512), random_t5(512, tie_word_embeddings=False), llama_head()):
        names = set(adapters.target_layers(model, settings))
        assert names and not any(name.startswith(("classifier", "score", "lm_head")) for name in names)


def llama_head():
    config = random_llama().config.to_dict() | {"num_labels": 3, "pad_token_id": 1}
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**config)).eval()


def test_a_type_that_does_not_fit_the_model_is_refused(tokenizer, tmp_path):
    t5 = str(folder_of(random_t5(len(tokenizer)), tokenizer, tmp_path / "t5"))
    with pytest.raises(
        UsageError, match=r"model\.type=CausalLM is not possible .* a t5 model; use model\.type=ConditionalGeneration"
    ):
        load_skeleton(t5)
    with pytest.raises(UsageError, match=r"needs a data set with classes, .*dataset=arithmetic .*cola"):
        run_config("model.type=SequenceClassification")


def rows_of_cola(place, count=24):
    place.mkdir()
    for split in ("train", "dev"):
        lines = [f"x\t{i % 2}\t\tsentence number {i} {'good' if i % 2 else 'bad'}" for i in range(count)]
        (place / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return place


def base_folder(kind, tokenizer, place):
    if kind == "t5":
        return folder_of(random_t5(len(tokenizer)), tokenizer, place)
    if kind == "bert":
        return folder_of(random_bert(len(tokenizer)), bert_tokenizer(), place)
    if kind == "roberta":
        return folder_of(random_roberta(len(tokenizer)), tokenizer, place)
    if kind == "distilbert":
        torch.manual_seed(0)
        sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "initializer_range": 0.1}
        config = DistilBertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=2, **sizes)
        return folder_of(DistilBertForSequenceClassification(config), tokenizer, place)
    return folder_of(random_llama(len(tokenizer)), tokenizer, place)


def test_a_layer_that_the_checkpoint_lacks_is_refused_beneath_adapters(tokenizer, tmp_path):
    """A BERT without its pooler, which would be random at every loading and is not part of an adapter."""
    base = folder_of(BertForMaskedLM(random_bert(len(tokenizer)).config), tokenizer, tmp_path / "bert")
    settings = ("dataset=cola", f"dataset.path={rows_of_cola(tmp_path / 'cola')}", "model=roberta_large")
    run = run_config(f"results_dir={tmp_path}", *settings, f"model.name={base}", "model.max_length=48")
    with pytest.raises(RunError, match=r"lacks bert\.pooler\.dense\.bias and 1 other.*peft=full_ft"):
        finish(run)


def test_a_model_that_also_reads_images_is_trained_on_text_and_keeps_the_rest(tokenizer, tmp_path):
    before = random_reader_of_images(len(tokenizer) + 1)
    base = folder_of(before, tokenizer, tmp_path / "base")
    folder = finish(small_run(tmp_path, base, "peft.lora_r=2", "dataset.train_size=16"))
    merge_run(folder)
    after = load_model(str(folder.path / "merged_checkpoint"), dtype="fp32")
    assert type(after) is type(before)
    old, new = before.state_dict(), after.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"{name}.weight" for name in adapters.target_layers(before, run_config("peft.lora_r=2").peft)}


def test_a_head_reads_the_token_before_the_padding_of_the_batches(tokenizer):
    """Whatever padding token the model's configuration named before."""
    model = padded_with(llama_head(), pad_id_of(tokenizer))
    assert model.config.pad_token_id == pad_id_of(tokenizer)


@pytest.mark.parametrize(
    ("kind", "init"),
    [
        ("t5", "gradient"),
        ("roberta", "gradient init.search_examples=8"),
        ("bert", "gradient"),
        ("distilbert", "gradient"),
        ("llama_head", "gradient"),
        ("roberta", "pissa"),
        ("t5", "milora"),
        ("roberta", "loram"),
        ("t5", "random_ab"),
        ("t5", "gora init.min_rank=1 init.iters=8"),
        ("roberta", "gora init.min_rank=1 init.iters=8"),
        ("t5", "lora_xs"),
        ("t5", "lora_ga_peft"),
        ("roberta", "lora_ga_peft"),
    ],
)
def test_a_run_of_every_kind_trains_and_leaves_what_plain_libraries_load(kind, init, tokenizer, tmp_path):
    base = base_folder(kind, tokenizer, tmp_path / "base")
    model_type = "ConditionalGeneration" if kind == "t5" else "SequenceClassification"
    run = run_config(
        f"results_dir={tmp_path}",
        "dataset=cola",
        f"dataset.path={rows_of_cola(tmp_path / 'cola')}",
        "model=roberta_large",
        f"model.name={base}",
        f"model.type={model_type}",
        "model.max_length=48",
        "model.epochs=8",
        "model.per_device_batch_size=4",
        "model.real_batch_size=8",
        "model.learning_rate=2e-2",
        "model.saving=true",
        *f"init={init}".split(),
        "peft.lora_r=2",
        "dataset.accuracy_examples=8",
        "dataset.max_new_tokens=8",
    )
    folder = finish(run)
    record = folder.read()
    encoded = load_dataset(run.dataset, encoder_for(run.model, run.dataset), 48).train
    read = sum(len(row.input_ids) + len(row.decoder_ids or ()) for row in encoded)
    assert record["train"]["tokens"] == 8 * read, "prompt and response, also of an encoder-decoder"
    assert record["train"]["last_loss"] < 0.97 * record["train"]["first_loss"]
    assert kind != "llama_head" or record["evaluation"]["final"]["eval_accuracy"] >= 0.75
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForSequenceClassification
    merged = auto.from_pretrained(folder.merged).eval()
    adapted = PeftModel.from_pretrained(auto.from_pretrained(base), str(folder.adapter)).eval()
    ids = torch.tensor([tokenizer("sentence number 3 good")["input_ids"]])
    more = {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if kind == "t5" else {}
    with torch.no_grad():
        one, other = (model(input_ids=ids, **more).logits for model in (merged, adapted))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    if kind != "t5":
        assert merged.config.id2label == dict(enumerate(WORDS))
    assert getattr(merged.config, "use_cache", None) == getattr(auto.from_pretrained(base).config, "use_cache", None)
    written = (folder.merged / "config.json").read_text()
    shutil.rmtree(folder.merged)
    merge_run(folder)
    assert (folder.merged / "config.json").read_text() == written, "merged later, it is the same model"
    assert json.loads((folder.adapter / "adapter_config.json").read_text())["task_type"] in ("SEQ_CLS", "SEQ_2_SEQ_LM")


@pytest.mark.parametrize(("name", "folder"), [("cola", "CoLA"), ("sst2", "SST-2"), ("mrpc", "MRPC"), ("rte", "RTE")])
@pytest.mark.parametrize("kind", ["t5", "roberta"])
def test_real_glue_files_train_either_kind(name, folder, kind, tokenizer, tmp_path):
    base = base_folder(kind, tokenizer, tmp_path / "base")
    model_type = "ConditionalGeneration" if kind == "t5" else "SequenceClassification"
    run = run_config(
        f"results_dir={tmp_path}",
        f"dataset={name}",
        f"dataset.path={shared(f'data/glue/{folder}')}",
        "model=t5small",
        f"model.name={base}",
        f"model.type={model_type}",
        "dataset.max_train_samples=64",
        "dataset.max_eval_samples=16",
        "init.search_examples=0",  # the loss on the gradient's own examples falls
        "dataset.accuracy_examples=4",
        "dataset.max_new_tokens=4",
        "model.max_length=62",
        "model.learning_rate=5e-3",
        "model.epochs=2",
        "peft.lora_r=2",
    )
    record = finish(run).read()
    assert record["train"]["steps"] == 4 and record["data"]["train"]["dropped"] == 0
    assert record["init"]["loss_after"] < record["init"]["loss_before"]
    assert 0 <= record["evaluation"]["final"]["eval_accuracy"] <= 1


def test_cached_start_belongs_to_its_random_head(tokenizer, tmp_path):
    """The gradient depends on the new head, so another head gives another start."""
    base = base_folder("llama_head", tokenizer, tmp_path / "base")

    def start(*overrides):
        run = run_config(
            f"results_dir={tmp_path}",
            "dataset=cola",
            f"dataset.path={tmp_path / 'cola'}",
            "model=roberta_large",
            f"model.name={base}",
            "model.max_length=48",
            "model.epochs=0",
            "init.seed=5",
            "init.iters=2",
            "peft.lora_r=2",
            *overrides,
        )
        return finish(run).read()["init"]

    rows_of_cola(tmp_path / "cola")
    one, other = (start(f"init.cache={tmp_path / 'cache'}", f"model.seed={seed}") for seed in (1, 2))
    assert not other["cached"] and other["loss_before"] != one["loss_before"]
    again = start(f"init.cache={tmp_path / 'cache'}", "model.seed=2", "overwrite=true")
    assert again["cached"] and again["loss_after"] == other["loss_after"]


@pytest.mark.parametrize("changes", [["peft=all_w_emb"], ["peft=adalora"], ["peft=dora"], ["init=lora_xs"]])
def test_dry_run_counts_whatever_trains(changes, tokenizer, tmp_path):
    base = base_folder("llama_head", tokenizer, tmp_path / "base")
    run = run_config(
        f"results_dir={tmp_path}",
        "dataset=mnli",
        f"dataset.path={rows_of_mnli(tmp_path / 'mnli')}",
        "model=roberta_large",
        f"model.name={base}",
        "model.epochs=0",
        "init.iters=2" if "init=lora_xs" not in changes and "peft=adalora" not in changes else "init.seed=1",
        "peft.lora_r=2",
        *changes,
    )
    said = plan(run, RunFolder(tmp_path)).partition(" trainable parameters")[0].rpartition(" ")[2]
    assert int(said.replace(",", "")) == finish(run).read()["trainable_parameters"]


def rows_of_mnli(place):
    place.mkdir()
    words = ("entailment", "neutral", "contradiction")
    rows = [{"premise": f"text {i}", "hypothesis": f"other {i}", "label": i % len(words)} for i in range(12)]
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return place / "train.jsonl"


@pytest.mark.parametrize(("kind", "peft"), [("t5", "all"), ("llama_head", "all"), ("t5", "full_ft")])
def test_the_loss_on_examples_held_out_is_that_of_the_run_s_own_validation(kind, peft, tokenizer, tmp_path):
    """For comparisons, which measure what a run has left."""
    data = rows_of_cola(tmp_path / "cola")
    run = run_config(
        f"results_dir={tmp_path}",
        "dataset=cola",
        f"dataset.path={data}",
        "model=roberta_large",
        f"model.name={base_folder(kind, tokenizer, tmp_path / 'base')}",
        f"model.type={'ConditionalGeneration' if kind == 't5' else 'SequenceClassification'}",
        "model.max_length=48",
        "model.epochs=4",
        "model.learning_rate=2e-2",
        f"peft={peft}",
        "init=default",
        "peft.lora_r=2",
    )
    folder = finish(run)
    held_out = HeldOut(run, dataclasses.replace(run.dataset, path=str(data / "dev.tsv")), 100)
    trained = folder.merged if peft == "full_ft" else folder.adapter
    expected = folder.read()["evaluation"]["final"]["eval_loss"]
    assert held_out(tmp_path / "trained", trained) == pytest.approx(expected, rel=1e-5)
    assert held_out(tmp_path / "base alone") != pytest.approx(expected, rel=1e-3)
    held_out.report = lambda trained: {"metrics": {"loss": float("nan")}}
    with pytest.raises(RunError, match=r"the loss on the test data is nan: lower model\.learning_rate"):
        held_out(tmp_path / "diverged", trained)
    assert not (tmp_path / "diverged").exists()
