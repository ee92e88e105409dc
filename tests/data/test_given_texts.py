"""``encode_batches``: batches from the texts of a caller."""

import pytest
import torch

from lora_one import encode_batches
from lora_one.errors import UsageError
from tests.helpers.models import random_llama, random_roberta


def test_texts_become_batches_with_a_loss_on_the_response(tokenizer):
    model = random_llama(len(tokenizer))
    one, two = encode_batches(
        model, tokenizer, [("2 + 2 =", " 4"), ("A long question?", " Yes"), ("?", "!")], batch_size=2
    )
    assert one["input_ids"].shape[0] == 2 and two["input_ids"].shape[0] == 1
    kept = one["labels"][0][one["labels"][0] != -100]
    assert tokenizer.decode(kept, skip_special_tokens=True) == " 4" and kept[-1] == tokenizer.eos_token_id


def test_rows_without_a_response_within_the_length_are_named(tokenizer):
    model = random_llama(len(tokenizer))
    with pytest.warns(UserWarning, match="1 of 2 rows have no response token within max_length=12"):
        (batch,) = encode_batches(model, tokenizer, [("short", "yes"), ("long " * 30, "no")], max_length=12)
    assert batch["labels"].shape[0] == 1
    with pytest.raises(UsageError, match="none of the 1 rows has a response token within max_length=12"):
        encode_batches(model, tokenizer, [("long " * 30, "no")], max_length=12)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no rows"),
        (["abc"], "row 0 is 'abc': pass a"),
        ([("a", "b"), ("a", "b", "c")], "row 1 is"),
        ([{"prompt": "a", "answer": "b"}], "row 0 is"),
        ([("a", 3)], "row 0 is"),
    ],
)
def test_rows_of_another_form_are_refused(rows, message, tokenizer):
    with pytest.raises(UsageError, match=message):
        encode_batches(random_llama(), tokenizer, rows)


def test_a_head_needs_texts_and_a_class(tokenizer):
    with pytest.raises(UsageError, match=r"pass lora_one\.Example"):
        encode_batches(random_roberta(), tokenizer, [("good", "positive")])


def test_mappings_are_pairs(tokenizer):
    (pairs,) = encode_batches(random_llama(), tokenizer, [("2 + 2 =", " 4")])
    (mappings,) = encode_batches(random_llama(), tokenizer, [{"response": " 4", "prompt": "2 + 2 ="}])
    assert pairs.keys() == mappings.keys() and all(torch.equal(pairs[key], mappings[key]) for key in pairs)
