"""Rows to examples: templates, filters, splits, real files."""

from lora_one.data import load_dataset
from lora_one.data.encode import Encoder
from tests.helpers.datasets import dataset_for
from tests.helpers.paths import shared


def test_real_gsm8k(sentencepiece_tokenizer):
    config = dataset_for("dataset=gsm8k", f"dataset.path={shared('data/gsm8k')}", "dataset.max_train_samples=100")
    splits = load_dataset(config, Encoder(sentencepiece_tokenizer), 384)
    assert splits.counts["rows"] == 7473 and len(splits.train_texts) == 100 and len(splits.validation_texts) == 473
    assert all(example.gold and "####" in example.response for example in splits.train_texts)
    counts = splits.counts["train"]
    assert counts["shortened"] > 0 and counts["whole"] + counts["shortened"] + counts["dropped"] == 100
