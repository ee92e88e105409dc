"""T5: angles between adapters and the one-step gradient, on a random BERT and on MiniLM."""

import math

import pytest
import torch

from tests.helpers.models import bert_tokenizer, folder_of, random_bert
from tests.helpers.paths import real_model, shared
from tests.helpers.toys import angles, runs

HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Folders of a random BERT and of 24 pairs; few examples for the gradient."""
    monkeypatch.setattr(angles, "EXAMPLES", 8)
    monkeypatch.setattr(angles, "BATCH", 4)
    folder = folder_of(random_bert(vocabulary=bert_tokenizer().vocab_size), bert_tokenizer(), tmp_path / "model")
    lines = [f"{row % 2}\t1\t2\tsentence number {row % 7} good\tsentence number {row % 5} bad\n" for row in range(24)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.tsv").write_text(HEADER + "".join(lines))
    return folder, tmp_path / "data"


def starts_in_the_subspace(found):
    """LoRA-One begins at the reference; LoRA begins with B = 0 and a random A."""
    for (method, kind), rows in runs(found, "method", "kind").items():
        first = rows[0]
        if method == "LoRA-One":
            assert first.B_max < 1 and first.A_max < 1, (kind, first)
        else:
            assert first.B_mean is None and first.B_max is None and first.A_mean > 45
            assert 0 < rows[-1].B_mean < 90


def test_lora_one_starts_in_the_subspace_of_the_gradient_and_lora_does_not(small):
    found = angles.rows(*small, steps=3, every=2)
    assert [row.step for row in found if (row.method, row.kind) == ("LoRA", "key")] == [0, 2, 3]
    assert {row.kind for row in found} == {"dense", "key", "query", "value"}
    starts_in_the_subspace(found)
    for line in angles.figure(found).axes[0].lines:
        assert all(math.isfinite(value) for value in line.get_ydata())


def test_both_methods_train_the_same_model_on_the_same_batches(small):
    (first, batches), (second, again) = (angles.prepared(*small, seed=1, steps=8) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    assert len(batches) == 8
    for one, other in zip(batches, again, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_the_reference_is_the_svd_of_the_mean_gradient(small):
    """Of all examples at once, by autograd."""
    model, batches = angles.prepared(*small, seed=1, steps=2)
    vectors = angles.leading_vectors(model, batches, seed=0)
    model.requires_grad_(True)
    sum(model(**batch).loss for batch in batches).backward()
    name = "bert.encoder.layer.1.attention.self.value"
    U, S, Vh = torch.linalg.svd(model.get_submodule(name).weight.grad)
    # a batch of this head has one direction per example at most: compare those that are above the rounding errors
    kept = int((S / S[0] > 1e-4).sum().clamp(max=angles.RANK))
    for found, wanted in ((vectors[name][0][:, :kept], U[:, :kept]), (vectors[name][1][:kept].T, Vh[:kept].T)):
        torch.testing.assert_close(found @ found.T, wanted @ wanted.T, atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.long
def test_on_minilm_and_mrpc(monkeypatch):
    monkeypatch.setattr(angles, "EXAMPLES", 32)
    monkeypatch.setattr(angles, "BATCH", 16)
    found = angles.rows(real_model("minilm-l6"), shared("data/glue/MRPC"), steps=6, every=3)
    starts_in_the_subspace(found)
    assert {row.kind for row in found} == {"dense", "key", "query", "value"}
