"""The controls of LoRA-One: init.shuffle=directions and spectrum."""

import pytest
import torch

from lora_one.adaptation import layers as adapters
from lora_one.errors import UsageError
from lora_one.initialization.methods import build_init
from lora_one.types import LayerView
from tests.helpers.runs import attach_llama, finish, run_config, small_run, start_of

M, N, R = 24, 16, 6


def layer():
    return LayerView("model.layer", (M, N), lambda: None, R, 4.0, torch.Generator().manual_seed(0))


def gradient(rank=N):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(M, rank, generator=generator) @ torch.randn(rank, N, generator=generator)


def both(shuffle, G):
    """LoRA-One's factors of a gradient, and those of the control."""
    init = run_config("init.stable_gamma=16", f"init.shuffle={shuffle}").init
    plain = start_of(init, layer(), G)
    return plain, build_init(init).rearrange(layer(), plain)


def triplets(factors):
    """U, S, Vh of B A, the product of the exact SVD."""
    U, S, Vh = torch.linalg.svd((factors.B @ factors.A).double(), full_matrices=False)
    return U[:, :R], S[:R], Vh[:R]


def cosines(one, other):
    """Cosines of the principal angles between the spans of the columns."""
    return torch.linalg.svdvals(one.T @ other)


def test_directions_keep_the_spectrum_and_lose_the_directions():
    plain, control = both("directions", gradient())
    (U, S, Vh), (U2, S2, V2h) = triplets(plain), triplets(control)
    torch.testing.assert_close(S2, S, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(control.B.T @ control.B, plain.B.T @ plain.B, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(control.A @ control.A.T, plain.A @ plain.A.T, rtol=1e-4, atol=1e-6)
    assert cosines(U, U2).min() < 0.7 and cosines(Vh.T, V2h.T).min() < 0.7
    assert not torch.allclose(control.B[:16], control.A.T), "different random vectors for the two factors"


def test_spectrum_keeps_the_subspaces_and_permutes_the_values():
    plain, control = both("spectrum", gradient())
    (U, S, Vh), (U2, S2, V2h) = triplets(plain), triplets(control)
    torch.testing.assert_close(S2, S, rtol=1e-4, atol=1e-8)
    assert cosines(U, U2).min() > 1 - 1e-5 and cosines(Vh.T, V2h.T).min() > 1 - 1e-5
    order = [int((control.B.norm(dim=0)[i] - plain.B.norm(dim=0)).abs().argmin()) for i in range(R)]
    assert sorted(order) == list(range(R)) and order != list(range(R))
    for i, j in enumerate(order):  # B_i A_i = (S_j / S_i) x that of LoRA-One
        scale = S[j] / S[i]
        expected = scale.float() * torch.outer(plain.B[:, i], plain.A[i])
        torch.testing.assert_close(torch.outer(control.B[:, i], control.A[i]), expected, rtol=1e-3, atol=1e-7)
    assert (control.B @ control.A * gradient()).sum() < 0, "every direction is still one of descent"


def test_directions_that_the_gradient_lacks_keep_their_zero():
    plain, control = both("spectrum", gradient(rank=4))
    assert not plain.B[:, 4:].any() and not control.B[:, 4:].any()
    assert torch.equal(control.A[4:], plain.A[4:]) and not torch.equal(control.A[:4], plain.A[:4])


@pytest.mark.parametrize("shuffle", ["directions", "spectrum"])
@torch.no_grad()
def test_a_control_has_the_scale_that_the_search_finds_without_it(shuffle):
    """In every layer ||s B A|| is that of LoRA-One, so only what is shuffled differs."""
    plain, start = attach_llama()
    control, shuffled = attach_llama(f"init.shuffle={shuffle}")
    assert shuffled.solution.gamma == start.solution.gamma
    assert shuffled.solution.searched == start.solution.searched
    assert shuffled.relative_shift == pytest.approx(start.relative_shift, rel=1e-4)
    for one, other in zip(adapters.lora_layers(plain).values(), adapters.lora_layers(control).values(), strict=True):
        assert not torch.allclose(one.lora_B["default"].weight, other.lora_B["default"].weight)
    # neither is known: the first-order formula and the search are about the factors before they were shuffled
    assert shuffled.solution.predicted_decrease is None and shuffled.solution.loss is None


def test_the_draws_depend_on_the_seed_and_the_layer_alone():
    (one, _), (other, _) = (attach_llama("init.shuffle=directions", "init.stable_gamma=16") for _ in range(2))
    factors = [layer.lora_A["default"].weight for layer in adapters.lora_layers(one).values()]
    again = [layer.lora_A["default"].weight for layer in adapters.lora_layers(other).values()]
    assert all(torch.equal(a, b) for a, b in zip(factors, again, strict=True))
    assert not torch.allclose(factors[0] / factors[0].norm(), factors[1] / factors[1].norm())


def test_a_run_records_the_control(tmp_path, llama_folder):
    small = ("model.epochs=0", "init.search_examples=0")
    plain = finish(small_run(tmp_path, llama_folder, *small))
    control = finish(small_run(tmp_path, llama_folder, *small, "init.shuffle=directions"))
    one, other = plain.read()["init"], control.read()["init"]
    assert control.path.parent.name.startswith("LoRA-One-r8-a16-search-shuffled-directions-lr")
    assert other["method"] == "LoRA-One, shuffled directions" and one["method"] == "LoRA-One"
    assert other["searched"] == one["searched"] and other["relative_shift"] == pytest.approx(one["relative_shift"])
    assert other["predicted_decrease"] is None
    assert other["loss_after"] > one["loss_after"], "measured with the shuffled factors"


def test_one_singular_value_has_no_order():
    with pytest.raises(UsageError, match=r"init\.shuffle=spectrum changes the order of peft\.lora_r=1"):
        attach_llama("init.shuffle=spectrum", "peft.lora_r=1")
    attach_llama("init.shuffle=directions", "init.stable_gamma=16", "peft.lora_r=1")


def test_other_directions_of_the_published_spelling_do_not_read_it():
    with pytest.raises(UsageError, match=r"init\.shuffle=spectrum is used only by LoRA-One, not by LoRA-GA"):
        run_config("init.direction=LoRA-GA", "init.shuffle=spectrum")
