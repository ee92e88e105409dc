"""Scaled optimisers: the step of eq. 9, its invariances, what it leaves alone, and that torch's tools take it."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import clip_grad_norm_

from lora_one.adaptation.core_modules import Core, Frozen
from lora_one.errors import RunError, UsageError
from lora_one.optim import AdamW, create_scaled_optimizer, precondition
from lora_one.optim.pairs import lora_pairs
from lora_one.optim.precondition import damped_inverses
from tests.helpers.models import FactorLayer, random_llama
from tests.helpers.paths import ROOT

SHAPES = [(12, 8, 3), (8, 12, 3), (12, 8, 3), (10, 9, 2)]  # m, n, r


def random_layers(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    layers = nn.ModuleList(FactorLayer(normal(m, r), normal(r, n)) for m, n, r in shapes)
    layers.targets = [normal(m, n) for m, n, r in shapes]
    return layers


def loss_of(layers):
    """1/2 ||B A - T||^2, summed over layers."""
    return sum((x.B @ x.A - target).square().sum() / 2 for x, target in zip(layers, layers.targets, strict=True))


def backward(layers):
    layers.zero_grad()
    loss = loss_of(layers)
    loss.backward()
    return loss


def preconditioned(B, A, target, reg):
    """g_A and g_B of the same loss, written out."""
    eye = torch.eye(A.shape[0], dtype=A.dtype)
    error = B @ A - target
    return torch.linalg.solve(B.T @ B + reg * eye, B.T @ error), torch.linalg.solve(A @ A.T + reg * eye, A @ error.T).T


def steps(layers, optimizer, count=3):
    for _ in range(count):
        backward(layers)
        optimizer.step()
    return [parameter.detach().clone() for parameter in layers.parameters()]


def adamw(layers, **options):
    return create_scaled_optimizer(layers, AdamW, lr=0.1, correct_bias=False, **options)


# The mathematics
@pytest.mark.parametrize("reg", [0.0, 1e-6, 0.5])
def test_one_step_of_scaled_gd_is_eq_9(reg):
    layers = random_layers()
    before = copy.deepcopy(layers)
    backward(layers)
    create_scaled_optimizer(layers, torch.optim.SGD, lr=0.3, reg=reg).step()
    for old, new, target in zip(before, layers, layers.targets, strict=True):
        g_A, g_B = preconditioned(old.B, old.A, target, reg)
        torch.testing.assert_close(new.A, old.A - 0.3 * g_A)
        torch.testing.assert_close(new.B, old.B - 0.3 * g_B)


def test_sequential_order_preconditions_b_by_the_new_a():
    """The published code's: the gradients are of the old point, B's Gram matrix is of the new A."""
    layers = random_layers()
    before = copy.deepcopy(layers)
    backward(layers)
    create_scaled_optimizer(layers, torch.optim.SGD, lr=0.3, reg=0.5, order="sequential").step()
    for old, new, target in zip(before, layers, layers.targets, strict=True):
        g_A, _ = preconditioned(old.B, old.A, target, 0.5)
        torch.testing.assert_close(new.A, old.A - 0.3 * g_A)
        gram = new.A @ new.A.T + 0.5 * torch.eye(len(new.A), dtype=torch.float64)
        g_B = torch.linalg.solve(gram, old.A @ (old.B @ old.A - target).T).T
        torch.testing.assert_close(new.B, old.B - 0.3 * g_B)


def test_update_of_the_product_is_invariant_to_the_basis():
    """(B M, M^-1 A) with M invertible is the same B A; without damping, so is every step."""
    layers, other = random_layers(), random_layers()
    generator = torch.Generator().manual_seed(1)
    for layer in other:
        M = torch.randn(len(layer.A), len(layer.A), generator=generator, dtype=torch.float64)
        layer.A.data, layer.B.data = torch.linalg.solve(M, layer.A), layer.B @ M
    for each in (layers, other):
        steps(each, create_scaled_optimizer(each, torch.optim.SGD, lr=0.2, reg=0.0), 5)
    for one, two in zip(layers, other, strict=True):
        torch.testing.assert_close(one.B @ one.A, two.B @ two.A, rtol=1e-6, atol=1e-8)
        assert not torch.allclose(one.A, two.A, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_batched_factors_take_the_same_steps(order, dtype, monkeypatch):
    """As on a GPU. Three shapes, one of them twice; a factor that is not finite is still named."""
    one, other = random_layers(dtype), random_layers(dtype)
    expected = steps(one, adamw(one, order=order, reg=0.1))
    monkeypatch.setattr(precondition, "in_stacks", lambda device: True)
    found = steps(other, adamw(other, order=order, reg=0.1))
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right)
    backward(other)
    other[2].A.data.fill_(float("nan"))
    with pytest.raises(RunError, match=r"the Gram matrix of lora_A of 2 is not finite"):
        adamw(other).step()


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("correct_bias", [False, True])
def test_scaled_adamw_has_the_moments_of_the_preconditioned_gradient(correct_bias, order):
    layers = random_layers()
    options = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "correct_bias": correct_bias}
    optimizer = create_scaled_optimizer(layers, AdamW, lr=0.05, reg=1e-2, order=order, **options)
    expected = [(layer.B.detach().clone(), layer.A.detach().clone()) for layer in layers]
    moments = [[torch.zeros_like(f) for f in (B, B, A, A)] for B, A in expected]

    def adam(p, g, m, v, t):
        m.lerp_(g, 0.2), v.lerp_(g * g, 0.1)
        m_hat, v_hat = (m / (1 - 0.8**t), v / (1 - 0.9**t)) if correct_bias else (m, v)
        return p * (1 - 0.05 * 0.1) - 0.05 * m_hat / (v_hat.sqrt() + 1e-3)

    for t in range(1, 6):
        backward(layers)
        optimizer.step()
        for i, ((B, A), (mB, vB, mA, vA)) in enumerate(zip(expected, moments, strict=True)):
            g_A, g_B = preconditioned(B, A, layers.targets[i], 1e-2)
            new = adam(A, g_A, mA, vA, t)
            if order == "sequential":
                gram = new @ new.T + 1e-2 * torch.eye(len(new), dtype=torch.float64)
                g_B = torch.linalg.solve(gram, A @ (B @ A - layers.targets[i]).T).T
            expected[i] = (adam(B, g_B, mB, vB, t), new)
    for layer, (B, A) in zip(layers, expected, strict=True):
        torch.testing.assert_close((layer.B.data, layer.A.data), (B, A))


@pytest.mark.parametrize("implementation", [{}, {"foreach": True}, {"fused": True}])
def test_adamw_with_and_without_bias_correction(implementation):
    """With: torch's, bitwise. Without: m and v as they are, from the first step on."""
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    gradients = [torch.tensor([0.5, -1.0, 2e-9], dtype=torch.float64), torch.tensor([1.0, 3.0, 0.0]).double()]
    found = {}
    for name, cls, options in (
        ("torch", torch.optim.AdamW, {}),
        ("with", AdamW, {}),
        ("without", AdamW, {"correct_bias": False}),
    ):
        p = nn.Parameter(start.clone())
        optimizer = cls([p], lr=0.1, weight_decay=0.1, **options, **implementation)
        found[name] = []
        for p.grad in gradients:
            optimizer.step()
            found[name].append(p.detach().clone())
    assert torch.equal(found["torch"][1], found["with"][1])
    p, m, v = start, torch.zeros(3).double(), torch.zeros(3).double()
    for g, after in zip(gradients, found["without"], strict=True):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p * (1 - 0.1 * 0.1) - 0.1 * m / (v.sqrt() + 1e-8)
        torch.testing.assert_close(after, p)


def test_heavy_damping_is_adamw():
    """lambda -> infinity: the gradients are divided by lambda, to which AdamW is blind when its eps is divided too."""
    layers, plain = random_layers(), random_layers()
    options = {"weight_decay": 0.1, "betas": (0.9, 0.99)}
    ours = steps(layers, create_scaled_optimizer(layers, AdamW, lr=0.1, reg=1e12, eps=1e-15, **options), 5)
    theirs = steps(plain, torch.optim.AdamW(plain.parameters(), lr=0.1, eps=1e-3, **options), 5)
    torch.testing.assert_close(ours, theirs)


def test_relative_damping_is_a_share_of_the_mean_diagonal():
    grams = torch.stack([size * torch.tensor([[2.0, 1.0], [1.0, 4.0]], dtype=torch.float64) for size in (1, 1e4)])
    relative = damped_inverses(grams.clone(), 0.1, ["a", "b"], torch.float64, relative=True)
    for gram, inverse, size in zip(grams, relative, (1, 1e4), strict=True):
        torch.testing.assert_close(inverse, torch.linalg.inv(gram + 0.1 * 3 * size * torch.eye(2, dtype=torch.float64)))
    layers = random_layers()
    backward(layers)
    before = copy.deepcopy(layers)
    create_scaled_optimizer(layers, torch.optim.SGD, lr=1.0, reg=0.1, damping="relative").step()
    for old, new, target in zip(before, layers, layers.targets, strict=True):
        reg = 0.1 * (old.B.T @ old.B).diagonal().mean()
        torch.testing.assert_close(new.A, old.A - preconditioned(old.B, old.A, target, reg)[0])


def test_lora_start_is_finite_and_right_from_the_first_step():
    """B = 0: A's gradient is zero and stays so under 1 / lambda = 1e6; B's is preconditioned by A."""
    layers = random_layers(torch.float32)
    for layer in layers:
        layer.B.data.zero_()
    before = copy.deepcopy(layers)
    optimizer = create_scaled_optimizer(layers, torch.optim.SGD, lr=0.1, reg=1e-6)
    backward(layers)
    optimizer.step()
    for old, new, target in zip(before, layers, layers.targets, strict=True):
        assert torch.equal(new.A, old.A)
        wide = (old.B.double(), old.A.double(), target.double())
        torch.testing.assert_close(new.B.double(), -0.1 * preconditioned(*wide, 1e-6)[1], rtol=1e-4, atol=1e-6)
    losses = [backward(layers).item()]
    for _ in range(20):
        optimizer.step()
        losses.append(backward(layers).item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("damping", ["absolute", "relative"])
def test_zero_factor_without_damping_leaves_the_other_unchanged(damping):
    layers = random_layers(torch.float32)
    layers[1].B.data.zero_()
    A = layers[1].A.detach().clone()
    backward(layers)
    optimizer = create_scaled_optimizer(layers, torch.optim.SGD, lr=0.1, reg=0.0, damping=damping)
    optimizer.step()  # no warning: nothing is lost
    assert torch.equal(layers[1].A, A) and all(p.isfinite().all() for p in layers.parameters())


@pytest.mark.parametrize("share", [2e-3, 5e-3, 2e-2])
def test_weak_directions_are_preconditioned_as_in_fp64(share):
    """A column that nearly depends on the others: fp32 would round its part of the Gram matrix away.

    g_A = B^T G of the same fp32 factors in fp64 is the reference, so the rounding of the gradient counts as well.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    B, G = normal(512, 8), normal(512, 40)
    B[:, 7] = B[:, :7] @ normal(7) + share * B[:, 7]
    layer = FactorLayer(B, normal(8, 40))
    layer.A.grad, layer.B.grad = B.T @ G, torch.zeros_like(B)
    create_scaled_optimizer(layer, torch.optim.SGD, lr=0.0, reg=1e-6).step()
    wide = B.double()
    expected = torch.linalg.solve(wide.T @ wide + 1e-6 * torch.eye(8, dtype=torch.float64), wide.T @ G.double())
    assert (layer.A.grad - expected).norm() < 2e-6 / share * expected.norm()


@pytest.mark.parametrize("reg", [1e-6, 0.0])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_rounding_of_a_gradient_is_not_a_step(scale, reg):
    """B of rank 4 of 8: g_A is zero across it except for rounding, which 1 / lambda would make the largest part."""
    generator = torch.Generator().manual_seed(0)
    B = scale * torch.randn(512, 4, generator=generator) @ torch.randn(4, 8, generator=generator)
    G = torch.randn(512, 40, generator=generator)
    layer = FactorLayer(B, torch.randn(8, 40, generator=generator))
    layer.A.grad, layer.B.grad = B.T @ G, torch.zeros_like(B)
    with pytest.warns(UserWarning, match=r"is singular in torch.float32"):
        create_scaled_optimizer(layer, torch.optim.SGD, lr=0.0, reg=reg).step()
    expected = torch.linalg.pinv(B.double(), rtol=1e-5) @ G.double()
    assert (layer.A.grad - expected).norm() < 0.01 * expected.norm()


def test_only_singular_gram_matrices_get_extra_damping():
    """Two equal rows of size 1e3 and lambda 1e-6: rounding leaves no Cholesky factor. Never the identity."""
    layers = random_layers(torch.float32)
    layers[2].A.data[1] = layers[2].A.data[0] = 1e3 * layers[2].A.data[0]
    before = copy.deepcopy(layers)
    backward(layers)
    with pytest.warns(UserWarning, match=r"lora_A of 2 is singular in torch.float32 with lambda = 1e-06"):
        create_scaled_optimizer(layers, torch.optim.SGD, lr=1.0).step()
    for i, (old, new) in enumerate(zip(before, layers, strict=True)):
        B, A, target = old.B.double(), old.A.double(), layers.targets[i].double()
        reg = 1e-6 + (torch.finfo(torch.float32).eps ** 0.5 * (A @ A.T).diagonal().mean() if i == 2 else 0.0)
        torch.testing.assert_close(new.B.double(), B - preconditioned(B, A, target, reg)[1], rtol=1e-2, atol=1e-3)


def test_gram_matrix_that_is_not_finite_is_an_error():
    layers = random_layers()
    backward(layers)
    layers[3].B.data[0, 0] = float("nan")
    with pytest.raises(RunError, match=r"lora_B of 3 is not finite: .*lower the learning rate"):
        create_scaled_optimizer(layers, torch.optim.SGD, lr=0.1).step()


# Which parameters
def peft_model(**options):
    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(random_llama(), LoraConfig(**settings | options))


def frozen_half(model):
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    return model


def with_core(model):
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    layer.lora_B["default"] = Core(layer.lora_B["default"].weight.detach())
    layer.lora_A["default"] = Frozen(layer.lora_A["default"].weight.detach())
    return model


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        (lambda: peft_model(), 4),
        (lambda: peft_model(use_dora=True), 4),  # magnitude vectors between the factors
        (lambda: peft_model(target_modules=["q_proj", "up_proj", "embed_tokens"]), 4),
        (lambda: peft_model(modules_to_save=["lm_head"]), 4),
        (lambda: peft_model(bias="lora_only", lora_bias=True), 4),
        (lambda: peft_model(rank_pattern={"up_proj": 2}), 4),
        (lambda: frozen_half(peft_model()), 3),
        (lambda: with_core(peft_model()), 3),
    ],
    ids=["lora", "dora", "embedding", "head", "bias", "ranks", "frozen", "core"],
)
def test_pairs_are_preconditioned_and_everything_else_is_plain_adamw(model, pairs):
    ours, theirs = model(), model()
    assert len(lora_pairs(ours)) == pairs
    paired = {id(p) for pair in lora_pairs(ours) for p in (pair.A, pair.B)}
    for name, p in ours.named_parameters():
        same = f"lora_{'A' if 'lora_B' in name else 'B'}.default.weight"
        if id(p) in paired:  # the partner sits in the same layer
            pair = next(pair for pair in lora_pairs(ours) if p is pair.A or p is pair.B)
            assert name.startswith(pair.layer) and ours.get_parameter(f"{pair.layer}.{same}") in set(pair[1:])
    ids = torch.arange(2, 30).reshape(1, -1)
    for each, optimizer in (
        (ours, create_scaled_optimizer(ours, torch.optim.AdamW, lr=1e-3, reg=1e-3)),
        (theirs, torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3)),
    ):
        torch.manual_seed(0)
        each(ids, labels=ids).loss.backward()
        clip_grad_norm_(each.parameters(), 1.0)
        optimizer.step()
    start = dict(model().named_parameters())
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, two) == (id(one) not in paired), name
        assert torch.equal(one, start[name]) == (not one.requires_grad), name


def test_factors_without_a_gradient_are_skipped():
    layers = random_layers()
    backward(layers)
    layers[0].A.grad = layers[1].B.grad = None
    before = copy.deepcopy(layers)
    create_scaled_optimizer(layers, torch.optim.SGD, lr=0.1).step()
    moved = [not torch.equal(old, new) for old, new in zip(before.parameters(), layers.parameters(), strict=True)]
    assert moved == [False, True, True, False, True, True, True, True]


# An ordinary torch optimiser
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_state_is_saved_and_loaded_bitwise(order):
    """Saved after two steps, loaded with weights_only into a new one: the next steps are the same, bitwise."""
    layers = random_layers()
    optimizer = adamw(layers, reg=1e-3, order=order)
    steps(layers, optimizer, 2)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "layers": layers.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    (group,) = saved["optimizer"]["param_groups"]
    assert (group["reg"], group["relative_reg"], group["correct_bias"]) == (1e-3, False, False)
    assert set(saved["optimizer"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    again = random_layers()
    again.load_state_dict(saved["layers"])
    resumed = adamw(again, reg=7.0, order=order)  # the damping is loaded too
    resumed.load_state_dict(saved["optimizer"])
    assert all(map(torch.equal, steps(layers, optimizer), steps(again, resumed)))


def test_loads_the_state_of_a_plain_adamw():
    layers = random_layers()
    plain = torch.optim.AdamW(layers.parameters(), lr=0.1)
    steps(layers, plain, 2)
    optimizer = create_scaled_optimizer(layers, AdamW, lr=0.5, reg=1e-3)
    optimizer.load_state_dict(plain.state_dict())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["reg"], group["correct_bias"]) == (0.1, 1e-3, True)
    steps(layers, optimizer, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_deepcopy_with_its_model_takes_the_same_steps(copied, order):
    layers = random_layers()
    optimizer = adamw(layers, order=order)
    steps(layers, optimizer, 2)
    twin, its_optimizer = copied((layers, optimizer))
    assert type(its_optimizer) is type(optimizer) and isinstance(its_optimizer, AdamW)
    assert all(map(torch.equal, steps(layers, optimizer), steps(twin, its_optimizer)))


def test_schedule_and_damping_are_read_from_the_groups():
    layers = random_layers()
    optimizer = create_scaled_optimizer(layers, torch.optim.SGD, lr=0.2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for rate, reg in ((0.2, 1e-6), (0.1, 2.0)):
        optimizer.param_groups[0]["reg"] = reg
        before = copy.deepcopy(layers)
        backward(layers)
        optimizer.step()
        schedule.step()
        for old, new, target in zip(before, layers, layers.targets, strict=True):
            torch.testing.assert_close(new.A, old.A - rate * preconditioned(old.B, old.A, target, reg)[0])


def test_hooks_run_once_a_step_and_before_the_preconditioner():
    layers = random_layers()
    torch.optim.SGD(random_layers().parameters(), lr=0.1)  # from now on torch hooks this class's own step
    optimizer = create_scaled_optimizer(layers, torch.optim.SGD, lr=0.1)
    backward(layers)
    raw = layers[0].A.grad.clone()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.equal(layers[0].A.grad, raw)))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == [True, "after"]


def test_closure_is_evaluated_once_and_its_gradients_are_preconditioned():
    layers, other = random_layers(), random_layers()
    calls = []
    optimizer = create_scaled_optimizer(layers, torch.optim.SGD, lr=0.1)
    loss = optimizer.step(lambda: calls.append(1) or backward(layers))
    expected = steps(other, create_scaled_optimizer(other, torch.optim.SGD, lr=0.1), 1)
    assert len(calls) == 1 and loss.item() == pytest.approx(backward(random_layers()).item())
    assert all(map(torch.equal, layers.parameters(), expected))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_passes_unscaled_gradients_and_skips_overflow(fused):
    layers, other = random_layers(torch.float32), random_layers(torch.float32)
    optimizer = create_scaled_optimizer(layers, torch.optim.AdamW, lr=0.1, fused=fused)
    expected = steps(other, create_scaled_optimizer(other, torch.optim.AdamW, lr=0.1, fused=fused), 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        layers.zero_grad()
        scaler.scale(loss_of(layers)).backward()
        scaler.step(optimizer)
        scaler.update()
    for ours, theirs in zip(layers.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(layers)
    layers.zero_grad()
    scaler.scale(loss_of(layers)).backward()
    layers[0].A.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before.parameters(), layers.parameters()))


def test_bf16_factors_are_preconditioned_in_fp32():
    layers = random_layers(torch.bfloat16)
    backward(layers)
    raw = [(layer.A.grad.clone(), layer.B.grad.clone()) for layer in layers]
    create_scaled_optimizer(layers, torch.optim.SGD, lr=0.0, reg=1e-2).step()
    for layer, (g_A, g_B) in zip(layers, raw, strict=True):
        A, B, eye = layer.A.double(), layer.B.double(), 1e-2 * torch.eye(len(layer.A), dtype=torch.float64)
        expected_A = torch.linalg.solve(B.T @ B + eye, g_A.double())
        expected_B = torch.linalg.solve(A @ A.T + eye, g_B.double().T).T
        for grad, expected in ((layer.A.grad, expected_A), (layer.B.grad, expected_B)):
            assert grad.dtype == torch.bfloat16
            torch.testing.assert_close(grad.double(), expected, rtol=2**-8, atol=1e-4)  # rounded once, at the end


def test_autocast_and_lower_matmul_precision_do_not_reach_the_preconditioner(monkeypatch):
    layers, other = random_layers(torch.float32), random_layers(torch.float32)
    expected = steps(other, create_scaled_optimizer(other, torch.optim.SGD, lr=0.1), 1)
    backward(layers)
    optimizer = create_scaled_optimizer(layers, torch.optim.SGD, lr=0.1)
    backends, seen = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), []

    def watched(*arguments, **options):  # no product here is large enough for a CPU to lower it
        seen.extend(backend.fp32_precision for backend in backends)
        return original(*arguments, **options)

    original = precondition.inverses_of
    monkeypatch.setattr(precondition, "inverses_of", watched)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32"
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
        assert [backend.fp32_precision for backend in backends] == ["tf32", "tf32"], "left as they were"
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
    assert set(seen) == {"ieee"} and len(seen) == 4  # two ranks, so two batches
    assert all(map(torch.equal, layers.parameters(), expected))


def test_any_inner_optimizer_and_any_of_its_implementations():
    results = {}
    for name, cls, options in (
        ("loop", AdamW, {"foreach": False}),
        ("foreach", AdamW, {"foreach": True}),
        ("fused", AdamW, {"fused": True}),
        ("Adam", torch.optim.Adam, {"weight_decay": 0.0}),
        ("Adagrad", torch.optim.Adagrad, {}),
    ):
        layers = random_layers()
        options = {"weight_decay": 0.0} | options
        optimizer = create_scaled_optimizer(layers, cls, lr=0.05, reg=1e-3, **options)
        assert isinstance(optimizer, cls)
        start = backward(layers).item()
        results[name] = steps(layers, optimizer, 10)
        assert backward(layers).item() < start, name
    for name in ("foreach", "fused", "Adam"):
        torch.testing.assert_close(results[name], results["loop"])


def test_accelerate_prepares_it():
    from accelerate import Accelerator

    layers, other = random_layers(torch.float32), random_layers(torch.float32)
    expected = steps(other, adamw(other), 3)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(layers, adamw(layers))
    for _ in range(3):
        prepared.zero_grad()
        accelerator.backward(loss_of(prepared))
        optimizer.step()
    assert all(map(torch.equal, layers.parameters(), expected))


def test_replaced_parameters_are_an_error():
    layers = random_layers()
    optimizer = create_scaled_optimizer(layers, torch.optim.SGD, lr=0.1)
    optimizer.param_groups[0]["params"] = [nn.Parameter(p.detach().clone()) for p in layers.parameters()]
    with pytest.raises(RunError, match=r"factors of 0 are no longer parameters .* wrap or shard the model first"):
        optimizer.step()


# Wrong use
@pytest.mark.parametrize(
    ("cls", "options", "error", "said"),
    [
        (torch.optim.LBFGS, {}, UsageError, r"LBFGS evaluates the loss several times .* AdamW or SGD"),
        (torch.optim.SGD, {"reg": -1.0}, UsageError, r"reg=-1.0 is out of range: .* not negative"),
        (torch.optim.SGD, {"reg": float("nan")}, UsageError, r"reg=nan is out of range"),
        (torch.optim.SGD, {"damping": "relativ"}, UsageError, r"damping=relativ .* did you mean relative\?"),
        (torch.optim.SGD, {"order": "seq"}, UsageError, r"order=seq is not a choice; .*sequential"),
        (torch.optim.SGD, {"params": [nn.Parameter(torch.ones(1))]}, UsageError, r"no layer has both .* use SGD"),
        (nn.Linear, {}, TypeError, r"must be a subclass of torch.optim.Optimizer"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_wrong_use_gives_one_clear_message(cls, options, error, said):
    with pytest.raises(error, match=said) as raised:
        create_scaled_optimizer(random_layers(), cls, lr=0.1, **options)
    assert isinstance(raised.value, ValueError | TypeError)


def test_a_model_without_lora_is_refused():
    with pytest.raises(UsageError, match=r"no layer has both of its LoRA factors.*use AdamW itself"):
        create_scaled_optimizer(nn.Linear(3, 3), torch.optim.AdamW, lr=0.1)


def test_signature_is_peft_s_and_its_gradient_too():
    """Ours in the place of theirs, with the same arguments: the same step."""
    from peft.optimizers import create_riemannian_optimizer

    layers, other = random_layers(), random_layers()
    ours = create_scaled_optimizer(layers, torch.optim.AdamW, lr=0.1, reg=1e-2, weight_decay=0.1)
    theirs = create_riemannian_optimizer(other, torch.optim.AdamW, lr=0.1, reg=1e-2, weight_decay=0.1)
    torch.testing.assert_close(steps(layers, ours, 5), steps(other, theirs, 5))


def test_import_needs_neither_hydra_nor_omegaconf():
    program = (
        "import sys; sys.modules['hydra'] = sys.modules['omegaconf'] = sys.modules['peft'] = None\n"
        "from lora_one.optim import create_scaled_optimizer"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(ROOT), check=True)
