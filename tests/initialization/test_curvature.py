"""The largest eigenvalue of the Hessian against the whole Hessian, and against what theory says of plain LoRA."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lora_one.adaptation import layers as adapters
from lora_one.data.encode import batches_of
from lora_one.initialization.curvature import adapter_parameters, curvature_by_layer, hessian_product, largest_curvature
from lora_one.losses import loss_count, loss_sum, model_logits, targets
from tests.helpers.examples import autograd_gradients, examples
from tests.helpers.models import Experts, random_llama
from tests.helpers.runs import attach_llama

DATA = examples(3)


def model_with(*overrides):
    base = random_llama(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    base.set_attn_implementation("eager")
    return attach_llama("peft.lora_r=1", "model.bf16=false", *overrides, base=base.double())[0].double()


def whole_hessian(model, parameters):
    """By autograd, one row at a time."""
    loss, count = 0.0, 0
    for batch in batches_of(DATA, 1, 0):
        loss = loss + loss_sum(model_logits(model, batch), targets(batch), "example")
        count += loss_count(targets(batch), "example")
    gradient = torch.autograd.grad(loss / count, parameters, create_graph=True)
    flat = torch.cat([part.reshape(-1) for part in gradient])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in flat]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


@pytest.fixture(scope="module")
def started():
    return model_with("init=gaussian", "init.lora_B=gaussian", "init.lora_A_std=0.5", "init.lora_B_std=0.5").eval()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_largest_eigenvalue_is_that_of_the_whole_hessian(started, batch_size):
    parameters = list(adapter_parameters(started).values())
    H = whole_hessian(started, parameters)
    found = largest_curvature(started, batches_of(DATA, batch_size, 0), "example", seed=0)
    exact = float(torch.linalg.eigvalsh(H)[-1])
    assert found.value == pytest.approx(exact, rel=0.01) and abs(found.value - exact) <= found.error
    assert found.products < 30 and found.converged
    v = torch.randn(len(H), dtype=torch.float64)
    product = hessian_product(started, parameters, batches_of(DATA, batch_size, 0), "example")
    torch.testing.assert_close(product(v), H @ v, rtol=1e-4, atol=1e-4)  # the norms of Llama are in fp32


def test_by_layer_it_is_that_of_the_blocks_on_the_diagonal(started):
    found = curvature_by_layer(started, batches_of(DATA, 3, 0), "example", seed=0)
    assert found.keys() == adapters.lora_layers(started).keys()
    H = whole_hessian(started, list(adapter_parameters(started).values()))
    names = [name for name, p in adapter_parameters(started).items() for _ in range(p.numel())]
    for layer, value in found.items():
        mine = torch.tensor([f".{layer}.lora_" in name for name in names])
        assert value.value == pytest.approx(float(torch.linalg.eigvalsh(H[mine][:, mine])[-1]), rel=0.011), layer
        assert value.converged, layer
    assert all(p.requires_grad for p in adapter_parameters(started).values()), "what is trained is as before"


def test_at_zero_b_the_hessian_between_the_factors_is_the_gradient():
    """L(W + s B A): the second derivative in B and A is s G, and in A alone 0, because B = 0."""
    model = model_with("init=lora")
    gradients = autograd_gradients(
        random_llama(hidden_size=16, intermediate_size=16, num_hidden_layers=1).double(), DATA, "example"
    )
    for name, layer in adapters.lora_layers(model).items():
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        product = hessian_product(model, [B, A], batches_of(DATA, 3, 0), "example")
        m, n = len(B), A.shape[1]
        columns = torch.stack([product(unit) for unit in torch.eye(m + n, dtype=torch.float64)[m:]])
        torch.testing.assert_close(columns[:, :m].T, layer.scaling["default"] * gradients[name], rtol=1e-4, atol=1e-7)
        assert not columns[:, m:].any(), name


def test_layers_that_no_batch_uses_have_no_curvature():
    """Experts that are not reached: the Hessian has zero rows, and those of the others are as without them."""
    model = Experts(used=(0,))
    chosen = [model.experts[0].weight, model.experts[1].weight]
    for weight in chosen:
        weight.requires_grad_(True)
    batches = batches_of(examples(3, vocabulary=64), 1, 0)
    both = hessian_product(model, chosen, batches, "example")
    alone = hessian_product(model, chosen[:1], batches, "example")
    none = hessian_product(model, chosen[1:], batches, "example")
    v = torch.randn(sum(weight.numel() for weight in chosen), generator=torch.Generator().manual_seed(0))
    used = chosen[0].numel()
    found = both(v)
    torch.testing.assert_close(found[:used], alone(v[:used]))
    assert not found[used:].any() and not none(v[used:]).any() and found[:used].any()


def test_loss_that_is_not_finite_is_an_error(started):
    head = started.get_output_embeddings().weight
    kept = head.clone()
    head.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        largest_curvature(started, batches_of(DATA, 3, 0), "example", seed=0)
    head.copy_(kept)


class Opaque(torch.autograd.Function):
    """Attention whose backward pass is a constant to autograd, as that of flash_attention_2."""

    @staticmethod
    def forward(ctx, query, key, value):
        with torch.enable_grad():
            ctx.inputs = [part.detach().requires_grad_() for part in (query, key, value)]
            ctx.result = torch.nn.functional.scaled_dot_product_attention(*ctx.inputs, is_causal=True, enable_gqa=True)
        return ctx.result.detach()

    @staticmethod
    def backward(ctx, grad):
        return torch.autograd.grad(ctx.result, ctx.inputs, grad.detach(), retain_graph=True)


def opaque_attention(module, query, key, value, *_, **__):
    return Opaque.apply(query, key, value).transpose(1, 2), None


def test_attention_without_second_derivatives_is_replaced_for_the_curvature():
    AttentionInterface.register("opaque", opaque_attention)
    AttentionMaskInterface.register("opaque", sdpa_mask)
    model = model_with("init=gaussian", "init.lora_B=gaussian", "init.lora_A_std=0.5", "init.lora_B_std=0.5")
    batches = batches_of(DATA, 1, 0)
    expected = largest_curvature(model, batches, "example", seed=0).value
    base = model.get_base_model()
    base.set_attn_implementation("opaque")
    parameters = list(adapter_parameters(model).values())
    v = torch.ones(sum(p.numel() for p in parameters), dtype=torch.float64)
    wrong = hessian_product(model, parameters, batches, "example")(v)
    assert largest_curvature(model, batches, "example", seed=0).value == pytest.approx(expected, rel=1e-6)
    assert base.config._attn_implementation == "opaque"
    base.set_attn_implementation("eager")
    assert (hessian_product(model, parameters, batches, "example")(v) - wrong).norm() > 1e-3 * wrong.norm()
