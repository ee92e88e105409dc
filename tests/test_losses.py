"""The loss: by token, by example, and nothing else in it."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lora_one.data.encode import Encoded, batches_of, collate, pack
from lora_one.losses import (
    answer_logits,
    batch_count,
    batch_loss,
    loss_count,
    loss_sum,
    mean_loss,
    model_logits,
    targets,
)


def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator)
    labels = torch.tensor([[-100, -100, 4, 5, 1, -100], [-100, 7, 8, 9, 2, 3], [-100, -100, -100, -100, -100, 6]])
    return logits, labels


def by_hand(logits, labels):
    """Mean cross-entropy of each example's answer tokens, position t predicting the label at t + 1."""
    means, sums = [], []
    for row in range(3):
        losses = [cross_entropy(logits[row, t - 1], labels[row, t]) for t in range(1, 6) if labels[row, t] != -100]
        means.append(torch.stack(losses).mean())
        sums.append(torch.stack(losses).sum())
    return torch.stack(means), torch.stack(sums)


def test_reductions_weigh_examples_or_tokens():
    logits, labels = batch()
    means, sums = by_hand(logits, labels)
    torch.testing.assert_close(loss_sum(logits, targets({"labels": labels}), "example"), means.sum())
    torch.testing.assert_close(loss_sum(logits, targets({"labels": labels}), "token"), sums.sum())
    assert loss_count(targets({"labels": labels}), "example") == 3
    assert loss_count(targets({"labels": labels}), "token") == 3 + 5 + 1


def test_agrees_with_the_model_s_own_loss(llama):
    ids = torch.randint(2, 512, (1, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :7] = -100
    own = llama(input_ids=ids, labels=labels).loss
    ours = loss_sum(llama(input_ids=ids).logits, targets({"labels": labels}), "token") / loss_count(
        targets({"labels": labels}), "token"
    )
    torch.testing.assert_close(ours, own)


def test_half_precision_logits_are_summed_in_fp32():
    logits, labels = batch()
    low = loss_sum(logits.bfloat16(), targets({"labels": labels}), "token")
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss_sum(logits.bfloat16().float(), targets({"labels": labels}), "token"))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduction", ["token", "example"])
def test_neither_padding_nor_its_side_nor_batching_changes_the_mean(llama, side, reduction):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, 512, (n,), generator=generator).tolist() for n in (6, 17, 11)]
    examples = [Encoded(row, [-100] * 3 + row[3:]) for row in rows]
    alone = mean_loss(llama, batches_of(examples, 1, 0), reduction)
    together = mean_loss(llama, [collate(examples, pad_id=0, side=side)], reduction)
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("reduction", ["token", "example"])
def test_packed_examples_have_the_loss_and_the_gradient_of_each_alone(llama, attention, reduction):
    """In one row, of unequal lengths and answers; the first token of an example is nobody's target."""
    llama.set_attn_implementation(attention)
    weight = llama.model.layers[0].self_attn.k_proj.weight.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, 512, (n,), generator=generator).tolist() for n in (6, 17, 11)]
    examples = [Encoded(row, [-100] * k + row[k:]) for k, row in zip((2, 1, 0), rows, strict=True)]
    sums, gradients, counts = [], [], []
    for batches in ([collate([example], 0) for example in examples], [pack(examples)]):
        positions = [batch.get("position_ids") for batch in batches]
        total = sum(
            loss_sum(model_logits(llama, b), targets(b), reduction, p) for b, p in zip(batches, positions, strict=True)
        )
        sums.append(total)
        gradients.append(torch.autograd.grad(total, weight)[0])
        pairs = zip(batches, positions, strict=True)
        counts.append(sum(loss_count(targets(b), reduction, p) for b, p in pairs))
    torch.testing.assert_close(sums[1], sums[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert counts == [3, 3] if reduction == "example" else counts == [4 + 16 + 10] * 2
    packed = pack(examples)  # the loss of an initialisation and its divisor are read from the batch alone
    torch.testing.assert_close(batch_loss(llama, packed, reduction)[0], sums[0])
    assert batch_loss(llama, packed, reduction)[1] == batch_count(packed, reduction) == counts[0]
    from_two = packed | {"position_ids": packed["position_ids"] + 2}  # as RoBERTa counts
    assert batch_count(from_two, reduction) == counts[0]


def test_prompt_tokens_do_not_count(llama):
    row = torch.randint(2, 512, (12,), generator=torch.Generator().manual_seed(2)).tolist()
    all_counted = mean_loss(llama, batches_of([Encoded(row, row)], 1, 0), "token")
    answer_only = mean_loss(llama, batches_of([Encoded(row, [-100] * 8 + row[8:])], 1, 0), "token")
    logits = llama(input_ids=torch.tensor([row])).logits[0]
    expected = cross_entropy(logits[7:-1], torch.tensor(row[8:]))
    assert answer_only == pytest.approx(float(expected), rel=1e-5) and answer_only != all_counted


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduction", ["token", "example"])
def test_logits_of_columns_without_a_counted_token_are_not_computed(llama, side, reduction):
    """Neither the loss nor its gradient misses them."""
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(2, 512, (n,), generator=generator).tolist() for n in (9, 14, 12)]
    together = collate([Encoded(row, [-100] * 6 + row[6:]) for row in rows], 0, side)
    few = answer_logits(llama, together)
    kept = slice(5, 13)  # the label at 6 is predicted at 5; the longest row begins at 0 on either side
    torch.testing.assert_close(few, model_logits(llama, together)[:, kept])
    wanted = targets(together)
    every = loss_sum(model_logits(llama, together), wanted, reduction)
    torch.testing.assert_close(loss_sum(few, wanted, reduction), every)
    nothing = together | {"labels": torch.full_like(together["labels"], -100)}
    few = answer_logits(llama, nothing)
    assert few.shape[1] == 1 and loss_sum(few, targets(nothing), reduction) == 0


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_logits_between_the_answers_of_packed_examples_are_not_computed(llama, reduction):
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(2, 512, (n,), generator=generator).tolist() for n in (9, 14)]
    batch = pack([Encoded(rows[0], [-100] * 6 + rows[0][6:]), Encoded(rows[1], [-100] * 12 + rows[1][12:])])
    few = answer_logits(llama, batch)
    every = model_logits(llama, batch)
    torch.testing.assert_close(few, every[:, [5, 6, 7, 9 + 11, 9 + 12]])
    positions = batch["position_ids"]
    expected = loss_sum(every, targets(batch), reduction, positions)
    torch.testing.assert_close(loss_sum(few, targets(batch), reduction, positions), expected)


def test_a_model_that_cannot_take_indices_is_asked_for_all_logits_or_refused(llama):
    batch = collate([Encoded([5, 6, 7, 8], [-100, -100, 7, 8])], 0)
    with pytest.raises(ValueError, match=r"logits of 1 positions, not of all 4 or of the 2 that logits_to_keep names"):
        loss_sum(model_logits(llama, batch)[:, -1:], targets(batch), "token")
    llama.hf_device_map = {"model": 0, "lm_head": 1}  # its output layer is on another device than its first parameter
    assert answer_logits(llama, batch).shape[1] == 4
    del llama.hf_device_map
