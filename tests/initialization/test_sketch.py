"""Every way of holding gradients gives the steps of autograd's full-weight gradient, in the memory it promises."""

import pytest
import torch

from lora_one.data.encode import batches_of
from lora_one.initialization.low_rank_step import StepSettings, low_rank_steps
from lora_one.initialization.sketch import sketched_steps
from tests.helpers.examples import RANK, autograd, examples, linear_layers
from tests.helpers.memory import Alive
from tests.helpers.models import random_llama, random_roberta, wide_llama


def test_energy_of_a_sketch_is_known_up_to_what_it_leaves_out():
    """Over many seeds the estimate is without bias, and off by no more than the share of G outside the subspace."""
    model = wide_llama()
    layers = {"model.layers.0.mlp.up_proj": model.model.layers[0].mlp.up_proj}
    batches = batches_of(examples(), 2, 0)
    (G,) = autograd(model, layers, batches).values()
    shares = torch.linalg.svdvals(G).square() / G.square().sum()
    energy, outside = float(shares[:RANK].sum()), float(shares[RANK + 24 :].sum())
    found = []
    for seed in range(12):
        sketched_steps(
            model,
            layers,
            batches,
            "example",
            lambda _, step: found.append(step.energy),
            singular_of=lambda name: RANK,
            tolerance=1e-3,
            seed=seed,
        )
    errors = torch.tensor(found) / energy - 1
    assert outside > 1e-3  # or nothing would be estimated here
    assert errors.abs().max() <= 0.5 * outside + 2e-3, (errors, outside)
    assert errors.mean().abs() <= 0.2 * outside + 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sketch_never_makes_a_gradient(checkpointing):
    model = random_llama(hidden_size=256, intermediate_size=400)  # no shape is that of a Krylov basis, (n, 11 j)
    layers, batches = linear_layers(model), batches_of(examples(), 2, 0)
    settings = StepSettings(singular=3, memory="low", checkpointing=checkpointing)
    with Alive(layers) as watch:
        low_rank_steps(model, layers, batches, "example", settings, lambda n, step: None)
    assert watch.most == 0


# gradients of low rank
def rows_of_a_head(model, count):
    """Examples of a classification head, whose first layer sees one token of each: G has rank ``count``."""
    ids = torch.randint(3, 64, (count, 9), generator=torch.Generator().manual_seed(1))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(count) % 2}
    return [{name: value[i : i + 1] for name, value in rows.items()} for i in range(count)]


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("count", [1, 2])
def test_missing_directions_are_named_and_orthonormal(memory, count):
    """S is exactly 0 there, the vectors are orthonormal, and the same wherever the gradient was held."""
    model = random_roberta(64).requires_grad_(False)
    layers = {"classifier.dense": model.classifier.dense, "query": model.roberta.encoder.layer[0].attention.self.query}
    batches, expected, found = rows_of_a_head(model, count), {}, {}
    message = rf"1 of 2 layers have fewer usable directions than needed: classifier\.dense \({count} of {RANK}\)\."
    for mode, steps_found in (("fast", expected), (memory, found)):
        with pytest.warns(UserWarning, match=message) as raised:
            settings = StepSettings(singular=RANK, memory=mode)
            low_rank_steps(model, layers, batches, "example", settings, steps_found.__setitem__)
        assert len(raised) == 1
    step = found["classifier.dense"]
    assert step.usable == count and not step.S[count:].any() and not step.slopes[count:].any()
    assert found["query"].usable == RANK
    for vectors in (step.U, step.Vh.T):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(RANK), atol=1e-5, rtol=0)
    torch.testing.assert_close(step.U, expected["classifier.dense"].U, atol=1e-4, rtol=0)
    torch.testing.assert_close(step.Vh, expected["classifier.dense"].Vh, atol=1e-4, rtol=0)
