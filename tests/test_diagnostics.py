"""Spectra and angles against dense formulas, where m x n matrices are small enough to form."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from lora_one.adaptation import checkpoints
from lora_one.diagnostics import by_kind, layer_diagnostics, principal_angles
from lora_one.types import AdapterFactors
from tests.helpers.runs import finish, small_run

SHAPE, RANK = (40, 30), 10


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors(rank=RANK, seed=3):
    U, _, Vh = torch.linalg.svd(random(*SHAPE, seed=seed))
    return U[:, :rank], Vh[:rank]


def dense_angles(P, Q):
    """arccos of the singular values of Q1^T Q2, in fp64, degrees."""
    Q1, Q2 = torch.linalg.qr(P.double()).Q, torch.linalg.qr(Q.double()).Q
    return torch.linalg.svdvals(Q1.T @ Q2).clamp(max=1).arccos().rad2deg()


@pytest.mark.parametrize("core", [None, random(RANK, RANK, seed=2)], ids=["B A", "B R A"])
def test_norms_and_values_are_those_of_the_dense_matrices(core):
    B, A = random(SHAPE[0], RANK), random(RANK, SHAPE[1], seed=1)
    found = layer_diagnostics(AdapterFactors(B, A, R=core))
    for name, matrix in (("B", B), ("A", A), ("BA", B @ A if core is None else B @ core @ A)):
        assert found[f"{name}_norm"] == pytest.approx(float(matrix.norm()), rel=1e-5)
        expected = torch.linalg.svdvals(matrix)[:8]
        assert_close(torch.tensor(found[f"{name}_singular"]), expected, rtol=1e-4, atol=1e-5)
    assert "B_angles" not in found, "no gradient was seen"


def test_angles_are_those_of_the_dense_subspaces():
    B, A = random(SHAPE[0], RANK), random(RANK, SHAPE[1], seed=1)
    U, Vh = vectors()
    found = layer_diagnostics(AdapterFactors(B, A), (U, Vh))
    assert_close(torch.tensor(found["B_angles"]), dense_angles(B, U).float(), rtol=1e-3, atol=1e-3)
    assert_close(torch.tensor(found["A_angles"]), dense_angles(A.T, Vh.T).float(), rtol=1e-3, atol=1e-3)


def test_the_gradient_s_own_vectors_have_no_angle_and_their_complement_a_right_one():
    U, Vh = vectors(rank=SHAPE[1])
    ours, rest = (U[:, :RANK], Vh[:RANK]), AdapterFactors(U[:, RANK : 2 * RANK], Vh[RANK : 2 * RANK])
    mixed = AdapterFactors(ours[0] @ random(RANK, RANK), random(RANK, RANK, seed=1) @ ours[1])  # the same spans
    for factors, angle in ((mixed, 0.0), (rest, 90.0)):
        found = layer_diagnostics(factors, ours)
        for side in "BA":
            assert found[f"{side}_angles"] == pytest.approx([angle] * RANK, abs=1e-2)


def test_a_small_angle_is_exact_where_its_cosine_is_rounded_to_one():
    angle = 1e-4  # radians: 1 - cos is 5e-9, below what fp32 tells from 1
    P = torch.tensor([[1.0], [0.0], [0.0]])
    Q = torch.tensor([[math.cos(angle)], [math.sin(angle)], [0.0]])
    assert float(principal_angles(P, Q)) == pytest.approx(math.degrees(angle), rel=1e-4)


def test_zero_columns_have_no_angle():
    U, Vh = vectors()
    B = torch.zeros(SHAPE[0], RANK)
    assert layer_diagnostics(AdapterFactors(B, Vh), (U, Vh))["B_angles"] == []
    B[:, :2] = U[:, [0, 5]]
    assert layer_diagnostics(AdapterFactors(B, Vh), (U, Vh))["B_angles"] == pytest.approx([0, 0], abs=1e-2)


def test_factors_that_are_not_finite_have_no_diagnostics():
    assert layer_diagnostics(AdapterFactors(torch.full((4, 2), torch.nan), torch.ones(2, 3))) == {}


def test_means_are_over_layers_of_one_kind():
    layers = {
        "model.0.q": {"B_norm": 1.0, "B_singular": [1.0, 0.5], "B_angles": [0.0, 10.0]},
        "model.1.q": {"B_norm": 3.0, "B_singular": [3.0, 1.5], "B_angles": []},
        "model.1.k": {},
    }
    assert by_kind(layers) == {
        "q/B_norm": 2.0,
        "q/B_sigma_1": 2.0,
        "q/B_sigma_2": 1.0,
        "q/B_angle_max": 10.0,
        "q/B_angle_mean": 5.0,
    }


def looks(folder):
    return [json.loads(line) for line in (folder.path / "diagnostics.jsonl").read_text().splitlines()]


def test_diagnostics_do_not_change_a_run(tmp_path, llama_folder):
    """LoRA-One starts within the gradient's leading vectors; six steps, looked at every other one."""
    short = ("model.save_steps=6",)
    watched = finish(small_run(tmp_path / "1", llama_folder, *short, "wandb.diagnostics_every=2"))
    plain = finish(small_run(tmp_path / "2", llama_folder, *short))
    assert watched.path.parent.name == plain.path.parent.name, "the hash is the same"
    assert not (plain.path / "diagnostics.jsonl").exists() and not plain.gradient_vectors.exists()
    name = "adapter_model.safetensors"
    assert (watched.adapter / name).read_bytes() == (plain.adapter / name).read_bytes()

    lines = looks(watched)
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert all(len(line["layers"]) == 14 for line in lines)
    trained = load_file(watched.adapter / name)
    gradients = checkpoints.load_factors(watched.gradient_vectors)
    for layer, last in lines[-1]["layers"].items():
        B, A = (trained[f"base_model.model.{layer}.lora_{side}.weight"] for side in "BA")
        assert last["BA_norm"] == pytest.approx(float((B @ A).norm()), rel=1e-4)
        U, Vh = gradients[layer]
        assert_close(torch.tensor(last["B_angles"]), dense_angles(B, U).float(), rtol=1e-3, atol=1e-2)
        assert_close(torch.tensor(last["A_angles"]), dense_angles(A.T, Vh.T).float(), rtol=1e-3, atol=1e-2)
        assert max(lines[0]["layers"][layer]["B_angles"]) < 0.1 < max(last["B_angles"])


@pytest.mark.parametrize(
    ("init", "angles"),
    [
        ("init.direction=LoRA-GA", {"A": 0, "B": 90}),  # A = V[:r], B = U[r:2r]
        ("init.direction=LoRA-SB", None),  # from the gradient's signs
        ("init=default", None),
    ],
    ids=lambda value: str(value),
)
def test_angles_are_to_the_gradient_s_leading_vectors(tmp_path, llama_folder, init, angles):
    short = ("model.epochs=0", "wandb.diagnostics_every=5")
    (line,) = looks(finish(small_run(tmp_path, llama_folder, *short, *init.split())))
    assert line["step"] == 0
    for found in line["layers"].values():
        assert ("B_angles" in found) == (angles is not None)
        for side, angle in (angles or {}).items():
            assert found[f"{side}_angles"] == pytest.approx([angle] * 8, abs=0.1)


def test_a_cached_start_brings_its_vectors(tmp_path, llama_folder):
    short = ("model.epochs=0", f"init.cache={tmp_path / 'cache'}")
    finish(small_run(tmp_path / "0", llama_folder, *short))  # without them
    first, again = (
        looks(finish(small_run(tmp_path / folder, llama_folder, *short, "wandb.diagnostics_every=1")))
        for folder in "12"
    )
    assert first == again and all("B_angles" in found for found in first[0]["layers"].values())
