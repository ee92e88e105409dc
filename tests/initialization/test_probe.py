"""The examples of the one-step gradient."""

import pytest

from lora_one.data import load_dataset
from lora_one.data.encode import ClassEncoder, Encoder
from lora_one.errors import UsageError
from lora_one.initialization.probe import probe_batches
from lora_one.types import Example
from tests.helpers.runs import run_config


@pytest.fixture(scope="module")
def texts(tokenizer):
    return load_dataset(
        run_config("dataset.train_size=60", "dataset.validation_size=1").dataset, Encoder(tokenizer), 128
    ).train_texts


def rows(tokenizer, texts, *overrides):
    batches, _ = probe_batches(run_config(*overrides), texts, Encoder(tokenizer))
    return [
        tuple(row[: int(mask.sum())].tolist())
        for b in batches
        for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]


def test_eight_different_examples_by_default(tokenizer, texts):
    drawn = rows(tokenizer, texts)
    assert len(drawn) == len(set(drawn)) == 8


@pytest.mark.parametrize(
    ("size", "asked", "others"), [(60, "null", 32), (20, "null", 12), (15, "null", 0), (60, "8", 8), (60, "0", 0)]
)
def test_the_search_of_a_head_has_at_least_32_others(tokenizer, size, asked, others):
    """A head has one answer an example. With fewer, all others; if these are fewer than the gradient's, its own."""
    texts = [Example("", "yes", texts=(f"problem {place}",), label=place % 2) for place in range(size)]
    encoder = ClassEncoder(tokenizer)
    run = run_config("model.type=SequenceClassification", "dataset=sst2", f"init.search_examples={asked}")
    own, further = probe_batches(run, texts, encoder)
    assert sum(len(batch["labels"]) for batch in own) == 8
    assert sum(len(batch["labels"]) for batch in further or ()) == others
    causal = run_config(f"init.search_examples={asked}")
    assert causal.further_examples == (8 if asked == "null" else int(asked))
    assert run.published()["init"]["search_examples"] == (32 if asked == "null" else int(asked)), "part of the hash"
    assert causal.published()["init"]["search_examples"] == (None if asked == "null" else int(asked))


def test_draw_follows_its_seed_and_not_the_batch(tokenizer, texts):
    drawn = rows(tokenizer, texts, "seed=1")
    assert rows(tokenizer, texts, "seed=1", "init.bsz=4", "init.iters=2") == drawn
    assert rows(tokenizer, texts, "seed=2") != drawn
    assert rows(tokenizer, texts, "seed=2", "init.seed=1") == drawn


def test_subsample_and_whole_set(tokenizer, texts):
    assert len(rows(tokenizer, texts, "init.do_subsampling=true", "init.sub_size=20")) == 20
    assert len(set(rows(tokenizer, texts, "init.bsz=null", "init.iters=null"))) == 60


def test_rejects_more_examples_than_available(tokenizer, texts):
    with pytest.raises(UsageError, match=r"init\.bsz x init\.iters=61 exceeds the number of training examples, 60"):
        rows(tokenizer, texts, "init.iters=61")


def test_too_few_examples_with_an_answer_token_is_an_error(tokenizer, texts):
    long = [Example(text.prompt * 4, text.response) for text in texts]
    with pytest.raises(UsageError, match="needs 8 examples, but only 3 of the 63"):
        rows(tokenizer, [*long, *texts[:3]], "init.max_length=100")


def test_examples_without_an_answer_token_are_skipped(tokenizer, texts):
    long = [Example(text.prompt * 4, text.response) for text in texts]
    drawn = rows(tokenizer, [*long, *texts], "init.max_length=100")
    assert len(drawn) == 8 and all(len(row) <= 100 for row in drawn)
