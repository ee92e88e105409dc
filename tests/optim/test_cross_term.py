"""The cross term of a first step: the formula against real steps, and a warning where it matters."""

import copy

import pytest
import torch

from lora_one.optim import LoraMuon, LoraPro, LoraRite, create_pair_optimizer
from lora_one.optim.cross_term import overshoot_warnings
from lora_one.optim.pairs import lora_pairs
from tests.helpers.factors import scaled_layers, steps
from tests.helpers.runs import finish, small_run

SHAPES = [(12, 8, 3), (8, 12, 3), (10, 9, 2)]


def norm(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2))


def small_layers(size):
    """Factors of unequal singular values, with products B A of the order of ``size``."""
    layers = scaled_layers(shapes=SHAPES, scalings=[2.0, 0.5, 3.0])
    for layer in layers:
        layer.B.data *= size
    return layers


@pytest.mark.parametrize(("optimizer", "lr"), [(LoraMuon, 0.1), (LoraRite, 0.02)])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_ratio_is_that_of_a_real_step(optimizer, lr, size):
    """For each layer: ||s D_B D_A|| / max(||s D_B A||, ||s B D_A||), from the step that the optimizer takes."""
    layers = small_layers(size)
    options = {"damping": 1e-9, "sign_steps": 16} if optimizer is LoraMuon else {"eps": 1e-14, "max_norm": 0.0}
    before = copy.deepcopy(layers)
    steps(layers, create_pair_optimizer(layers, optimizer, lr=lr, **options), 1)
    for old, new in zip(before, layers, strict=True):
        s, (m, n) = old.scaling["default"], (len(old.B), old.A.shape[1])
        D_B, D_A = new.B.data - old.B.data, new.A.data - old.A.data
        r = len(old.A)
        smallest = s * torch.linalg.svdvals(old.B.data @ old.A.data)[r - 1].item()
        first = max(norm(s * D_B @ old.A.data), norm(s * old.B.data @ D_A))
        predicted = optimizer.first_change(lr, s, m, n) / smallest
        assert norm(s * D_B @ D_A) / first == pytest.approx(predicted, rel=1e-3)


@pytest.mark.parametrize(("optimizer", "lr"), [(LoraMuon, 0.1), (LoraRite, 0.02)])
def test_warning_names_the_learning_rate_at_which_it_ends(optimizer, lr):
    pairs = lora_pairs(small_layers(1e-3))
    (warning,) = overshoot_warnings(optimizer, "mine", pairs, lr)
    assert f"optimizer=mine overshoots at the start with model.learning_rate={lr:g}" in warning
    safe = float(warning.partition("or model.learning_rate=")[2].split()[0])
    assert overshoot_warnings(optimizer, "mine", pairs, 0.95 * safe) == []
    assert len(overshoot_warnings(optimizer, "mine", pairs, 1.05 * safe)) == 1


def test_no_warning_for_large_starts_zero_b_and_optimizers_without_a_formula():
    assert overshoot_warnings(LoraRite, "mine", lora_pairs(small_layers(1.0)), 1e-3) == []
    zero = lora_pairs(scaled_layers(zero_B=True))
    assert overshoot_warnings(LoraMuon, "mine", zero, 1.0) == [] == overshoot_warnings(LoraRite, "mine", zero, 1.0)
    assert overshoot_warnings(LoraPro, "mine", lora_pairs(small_layers(1e-6)), 1.0) == []


def test_directions_that_are_zero_up_to_rounding_do_not_count():
    layers = small_layers(1.0)
    for layer in layers:
        layer.B.data[:, 1] = layer.B.data[:, 0]
    assert overshoot_warnings(LoraRite, "mine", lora_pairs(layers), 1e-3) == []


@pytest.mark.parametrize(("start", "warned"), [("init=lora_one", True), ("init=lora", False)])
def test_a_run_says_it_before_training(start, warned, tmp_path, llama_folder, capsys):
    options = ("optimizer=lora_muon", "model.learning_rate=0.5")
    run = small_run(tmp_path, llama_folder, start, *options)
    warnings = finish(run).read()["init"]["warnings"]
    said = capsys.readouterr().out
    assert [w for w in warnings if "optimizer=lora_muon overshoots at the start" in w] == (warnings if warned else [])
    assert ("WARNING: optimizer=lora_muon overshoots" in said.partition("training:")[0]) == warned
