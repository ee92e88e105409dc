"""The batches that a caller passes are divided into examples only where that is possible."""

import pytest
import torch

from lora_one.errors import UsageError
from lora_one.initialization.given_batches import one_by_one, rows_between, take
from tests.helpers.models import random_llama, random_roberta


def packed(rows=1):
    ids = torch.arange(12 * rows).reshape(rows, 12)
    return {"input_ids": ids, "labels": ids, "cu_seq_lens_q": torch.tensor([0, 5, 12]), "max_length_q": 7}


def test_a_whole_batch_keeps_every_value():
    """FlashAttention's boundaries of packed examples have another first dimension."""
    for given in (rows_between([packed()], 0, 1), list(one_by_one([packed()]))):
        assert len(given) == 1 and given[0].keys() == packed().keys() and given[0]["max_length_q"] == 7
        assert given[0]["cu_seq_lens_q"].tolist() == [0, 5, 12] and given[0]["input_ids"].shape == (1, 12)


def test_part_of_a_batch_keeps_what_is_not_a_tensor_of_rows():
    batch = {"labels": torch.arange(3), "use_cache": False, "weight": torch.tensor(2.0), "names": ["a", "b"]}
    (part,) = rows_between([batch], 1, 2)
    assert part["labels"].tolist() == [1] and part["names"] == ["a", "b"] and not part["use_cache"]
    assert part["weight"] == 2


def test_a_decoder_reads_masked_positions_before_its_last_label():
    """A masked prompt of the decoder stays: without it, the other positions would read something else."""
    labels = torch.tensor([[-100, -100, 5, -100, 6, -100], [-100, 7, 8, -100, -100, -100]])
    ids = torch.arange(12).reshape(2, 6)
    batch = {"input_ids": torch.arange(14).reshape(2, 7), "decoder_input_ids": ids, "labels": labels}
    first, second = one_by_one([batch])
    assert first["labels"].tolist() == [[-100, -100, 5, -100, 6]] and second["labels"].tolist() == [[-100, 7, 8]]
    assert first["decoder_input_ids"].tolist() == [[0, 1, 2, 3, 4]] and first["input_ids"].shape == (1, 7)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]])
    first, second = one_by_one([batch | {"decoder_attention_mask": mask}])
    assert first["labels"].shape == (1, 6) and second["decoder_input_ids"].tolist() == [[7, 8]]
    assert second["labels"].tolist() == [[7, 8]] and second["decoder_attention_mask"].tolist() == [[1, 1]]


@pytest.mark.parametrize(("rows", "head", "llama"), [(64, 32, 8), (20, 12, 8), (16, 8, 8), (15, 0, 0)])
def test_the_search_takes_at_least_32_examples_for_a_head(rows, head, llama):
    """As a run does: an example has one answer there. With fewer than the gradient's there is no second list."""
    ids = torch.arange(4 * rows).reshape(rows, 4)
    for model, labels, others in ((random_roberta(), torch.arange(rows) % 2, head), (random_llama(), ids, llama)):
        own, further = take(model, {"input_ids": ids, "labels": labels}, 8, further=True)
        assert [row["input_ids"].tolist() for row in own] == [ids[:8].tolist()]
        taken = torch.cat([row["input_ids"] for row in further]) if further else ids[:0]
        assert taken.tolist() == ids[8 : 8 + others].tolist()


@pytest.mark.parametrize("divide", [lambda batch: rows_between([batch], 0, 1), lambda batch: list(one_by_one([batch]))])
def test_a_tensor_that_cannot_be_divided_is_refused(divide):
    with pytest.raises(UsageError, match=r"cu_seq_lens_q has shape \(3,\), .* the 2 examples .*: pass batches of one"):
        divide(packed(2))
