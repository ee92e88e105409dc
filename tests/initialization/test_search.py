"""The start as a whole: its figures, the search for gamma, the cache, and DoRA-One."""

import math

import pytest
import torch

from lora_one.data.encode import batches_of
from lora_one.errors import RunError
from lora_one.initialization import scale_search
from lora_one.initialization.search import line_search
from lora_one.losses import mean_loss
from tests.helpers.examples import examples
from tests.helpers.runs import attach_llama, finish, lora_tensors, run_config, small_run


# the search
def saturating(size):
    """A loss that falls at first by 2 a unit of the size, ever more slowly, and then rises: least near 1.29."""
    return 1.5 - 2 * size / (1 + size) + 0.15 * size**2


@pytest.mark.parametrize("scale", [1e-4, 0.03, 1.0, 7.0, 1e5])
@pytest.mark.parametrize("loss", [saturating, lambda size: 1.5 - 2 * size + size**2], ids=["saturating", "parabola"])
def test_search_finds_the_least_loss_whatever_the_unit_of_its_size(scale, loss):
    """Within 1 % of the least loss on a fine grid, by at most 4 evaluations, none of them twice."""
    asked = []

    def loss_at(size):
        asked.append(size)
        return loss(size / scale)

    found, losses = line_search(loss_at, 1.5, 2 / scale)
    least = min(loss(10 ** (k / 200)) for k in range(-400, 400))
    assert losses[found] <= 1.01 * least and losses[found] == min(losses.values())
    assert len(asked) == len(set(asked)) == len(losses) <= 4


def test_search_recovers_from_losses_that_are_not_finite():
    """However far the first trial is beyond the sizes with a finite loss."""
    for limit in (0.5, 1e-3):
        found, losses = line_search(lambda size, limit=limit: math.nan if size > limit else 2 - size / limit, 2.0, 1.0)
        assert losses[found] < 2 and any(map(math.isnan, losses.values()))
    with pytest.raises(ValueError, match="not finite at any of the 8 scales"):
        line_search(lambda size: math.inf, 2.0, 1.0)


def test_search_continues_until_the_loss_falls():
    """The first-order decrease is 1000 times too large, as with a slope that is valid only near zero."""
    found, losses = line_search(lambda size: 2 - size + 1e4 * size**2, 2.0, 1.0)
    assert losses[found] < 2.0 and found < 1e-4


def test_search_ends_at_a_size_already_tried():
    """The parabola's vertex is exactly the first trial."""
    assert line_search(lambda size: 0.375, 1.0, 1.25) == (1.0, {1.0: 0.375})


def test_search_ends_where_no_step_lowers_the_loss():
    found, losses = line_search(lambda size: 2 + size, 2.0, 1.0)
    assert len(losses) == 8 and found == min(losses)


@pytest.mark.parametrize("peft", ["all", "dora"])
def test_searched_gamma_is_as_if_it_had_been_given(peft):
    model, start = attach_llama(f"peft={peft}", "init.scale=search")
    losses = start.solution.searched
    gamma = min(losses, key=losses.get)
    given, plain = attach_llama(f"peft={peft}", f"init.stable_gamma={gamma}")
    for name, value in lora_tensors(given).items():
        torch.testing.assert_close(lora_tensors(model)[name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert start.solution.predicted_decrease == pytest.approx(plain.solution.predicted_decrease, rel=1e-5)
    batches = batches_of(examples(), 2, 0)
    for other, loss in losses.items():
        model, _ = attach_llama(f"peft={peft}", f"init.stable_gamma={other}")
        assert mean_loss(model, batches, "example") == pytest.approx(loss, rel=1e-5), other
    assert losses[gamma] < start.solution.examples.loss


@pytest.mark.parametrize("fatal", [False, True])
def test_run_with_search_over_losses_that_are_not_finite(tmp_path, llama_folder, monkeypatch, fatal):
    """They are null in run.json; where none is a number, the run says so."""
    real, tried = scale_search.batches_loss, []

    def loss(model, batches, reduction):
        tried.append(batches)
        return math.nan if fatal or len(tried) == 1 else real(model, batches, reduction)

    monkeypatch.setattr(scale_search, "batches_loss", loss)
    own = ("init.scale=search", "init.search_examples=0")
    run = small_run(tmp_path, llama_folder, "model.epochs=0", *own)
    if fatal:
        with pytest.raises(RunError, match="the loss is not finite at any of the 8 scales"):
            finish(run)
        return
    found = finish(run).read()["init"]["searched"]
    assert None in found["losses"].values() and found["losses"][str(found["gamma"])] is not None
    finite = [value for value in found["losses"].values() if value is not None]
    assert found["losses"][str(found["gamma"])] == min(finite)


def test_search_examples_exclude_those_of_the_gradient(tmp_path, llama_folder):
    """The slope is the gradient's; the losses are those of other training examples, and so is the loss before."""
    short = ("model.epochs=0",)
    own = finish(small_run(tmp_path, llama_folder, *short, "init.search_examples=0")).read()["init"]
    other = finish(small_run(tmp_path, llama_folder, *short, "init.search_examples=6")).read()["init"]
    assert (own["searched"]["other_examples"], other["searched"]["other_examples"]) == (0, 6)
    assert len(other["searched"]["losses"]) <= 3, "the loss before counts as an evaluation"
    assert own["loss_before"] == other["loss_before"] and own["searched"] != other["searched"]
    assert own["loss_after"] == own["searched"]["losses"][str(own["searched"]["gamma"])]
    assert other["loss_after"] != other["searched"]["losses"][str(other["searched"]["gamma"])]


@pytest.mark.parametrize(("size", "others"), [(16, 8), (15, 0)])
def test_search_uses_equally_many_other_examples_by_default(tmp_path, llama_folder, size, others):
    short = ("model.epochs=0", f"dataset.max_train_samples={size}")
    record = finish(small_run(tmp_path, llama_folder, *short)).read()["init"]
    assert (record["examples"], record["searched"]["other_examples"]) == (8, others)


def test_default_of_lora_one_searches_and_a_gamma_implies_stable():
    assert run_config().init.scale == run_config("init.scale=search").init.scale == "search"
    assert run_config("init.stable_gamma=128").init == run_config("init.stable_gamma=128", "init.scale=stable").init
    assert run_config("init.direction=LoRA-GA").init.scale == run_config("init=lora_ga").init.scale == "stable"
