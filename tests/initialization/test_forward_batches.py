"""The start as a whole: its figures, the search for gamma, the cache, and DoRA-One."""

import math

import pytest
import torch

from lora_one.data.encode import Encoded, batches_of, collate
from lora_one.initialization import start as start_room
from lora_one.initialization.forward_batches import regrouped
from lora_one.initialization.solution import Probe
from lora_one.losses import mean_loss
from tests.helpers.examples import examples
from tests.helpers.models import random_llama, random_t5


# losses of a start
@torch.no_grad()
@pytest.mark.parametrize("reduction", ["example", "token"])
def test_regrouped_batches_hold_the_same_examples_with_less_padding(reduction):
    data = examples()
    batches, model = batches_of(data, 3, 0), random_llama()
    grouped = regrouped(batches, 5, 512)
    assert len(grouped) == 1 and len(grouped[0]["labels"]) == len(data)
    assert mean_loss(model, grouped, reduction) == pytest.approx(mean_loss(model, batches, reduction), rel=1e-6)
    lengths = [len(batch["labels"][0]) for batch in regrouped(batches, 5, 2**29 // 64)]  # few logits fit
    assert len(lengths) > 1 and lengths == sorted(lengths, reverse=True)
    assert sum(map(len, (batch["labels"] for batch in regrouped(batches, 5, 512, at_least=3)))) == len(data)
    assert len(regrouped(batches, 5, 512, at_least=3)) == 3


@torch.no_grad()
@pytest.mark.parametrize("longest", [10, 9])
def test_regrouping_keeps_every_label_of_an_encoder_decoder(longest):
    """Also where the longest answer is as long as the longest prompt."""
    rows = [([5] * 10, [7] * 3), ([6] * 4, [8] * longest)]
    data = [Encoded(prompt, answer, decoder_ids=[0, *answer[:-1]]) for prompt, answer in rows]
    batches = [collate(data, 0)]
    (grouped,) = regrouped(batches, 0, 512)
    for name in ("labels", "decoder_input_ids"):
        assert sorted(map(tuple, grouped[name].tolist())) == sorted(map(tuple, batches[0][name].tolist())), name
    model = random_t5()
    assert mean_loss(model, [grouped], "token") == pytest.approx(mean_loss(model, batches, "token"), rel=1e-6)


@torch.no_grad()
def test_a_padding_token_outside_of_the_embeddings_does_not_matter():
    """It is masked in a causal model, so the search pads with any token."""
    base = random_llama()
    base.config.pad_token_id = -1
    probe = Probe(batches_of(examples(), 2, 0), "example")
    assert math.isfinite(start_room.probe_loss(base, probe))


def test_batches_that_padding_could_change_are_left_alone():
    batches = batches_of(examples(), 3, 0)
    hole = [batch | {"attention_mask": batch["attention_mask"].clone()} for batch in batches]
    hole[0]["attention_mask"][0, 1] = 0
    assert regrouped(hole, 0, 512) is hole
    counted = [batch | {"labels": batch["input_ids"]} for batch in batches]  # on padding too
    assert regrouped(counted, 0, 512) is counted
    assert regrouped(batches, None, 512) is batches
    left = [batch | {"attention_mask": batch["attention_mask"].flip(1)} for batch in batches]
    assert regrouped(left, 0, 512) is left
    further = [batch | {"position_ids": batch["input_ids"]} for batch in batches]
    assert regrouped(further, 0, 512) is further
