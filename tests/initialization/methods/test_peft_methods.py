"""PEFT's own initialisations: that they are PEFT's, what they compute, and what refuses to run."""

import importlib.util

import pytest
import torch

from lora_one.adaptation import layers as adapters
from lora_one.data.encode import Encoded, batches_of
from lora_one.errors import RunError, UsageError
from lora_one.initialization.methods import build_init
from lora_one.initialization.methods import peft_methods as from_peft
from lora_one.initialization.solution import Probe
from lora_one.initialization.start import attach_adapters
from lora_one.records.folder import locate
from lora_one.runs.experiment import execute
from tests.helpers.examples import autograd_gradients, examples
from tests.helpers.models import random_llama
from tests.helpers.runs import adaptation_for, run_config, small_run

IDS = torch.arange(3, 40).reshape(1, -1)
R, S = 8, 16 / 8**0.5
SHIFTING = ["pissa", "olora", "corda", "lora_ga_peft"]
METHODS = [*SHIFTING, "eva"]

pytestmark = pytest.mark.usefixtures("attrs_package")


def attach(choice, *overrides, data=None, batch=2, base=None, dtype="fp32"):
    if choice == "pissa" and not overrides:
        overrides = ("init.niter=exact",)  # PEFT's; without it ours
    run = run_config(f"init={choice}", *overrides)
    probe = Probe(batches_of(data or examples(), batch, 0), "example")
    base = random_llama() if base is None else base
    return attach_adapters(base, adaptation_for(run, dtype), build_init(run.init), probe, seed=0)


def factors_of(model):
    return {
        name: (layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach())
        for name, layer in adapters.lora_layers(model).items()
    }


def weights():
    return {name: layer.weight for name, layer in adapters.target_layers(random_llama(), run_config().peft).items()}


def inputs_of(data, counted=False):
    """Each layer's inputs (tokens, n), one matrix an example: all tokens, or those with a label."""
    model = random_llama()
    seen = {}
    for name, layer in adapters.target_layers(model, run_config().peft).items():
        layer.register_forward_hook(
            lambda _module, given, _output, name=name: seen.setdefault(name, []).append(given[0][0])
        )
    for example in data:
        model(input_ids=torch.tensor([example.input_ids]))
    labels = [torch.tensor(example.labels) != -100 for example in data]
    if counted:
        return {name: [X[keep] for X, keep in zip(Xs, labels, strict=True)] for name, Xs in seen.items()}
    return seen


# what they are
@pytest.mark.parametrize("choice", SHIFTING)
def test_peft_s_change_of_the_base_is_the_product_of_its_factors(choice, monkeypatch):
    """PEFT's own model, before its wrapper comes off: base W - s B0 A0, so that ours is the same model."""
    original, theirs = from_peft._read, {"base": {}}

    @torch.no_grad()
    def remember(name, model, entry):
        theirs["logits"] = model(IDS).logits
        theirs["base"][name] = model.get_base_model().get_submodule(name).get_base_layer().weight.clone()
        return original(name, model, entry)

    monkeypatch.setattr(from_peft, "_read", remember)
    model, start = attach(choice)
    for name, W in weights().items():
        B0, A0 = start.initial_factors[name]
        torch.testing.assert_close(theirs["base"][name], W - S * B0 @ A0, rtol=1e-5, atol=1e-6, msg=name)
        assert (W - theirs["base"][name]).norm() > 1e-3 * W.norm()
    logits = model.eval()(IDS).logits
    assert (logits - theirs["logits"]).abs().max() <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("hidden", [32, 320])
def test_our_pissa_is_peft_s_exact_one(hidden):
    """The same s B A and so the same base, below and above the size up to which we take the exact SVD."""

    def base():
        model = random_llama(hidden_size=hidden, intermediate_size=400)
        for layer in adapters.target_layers(
            model, run_config().peft
        ).values():  # trained weights decay, random ones do not
            U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(U / torch.arange(1, len(S) + 1) @ Vh)
        return model

    with torch.no_grad():
        ours, _ = attach("pissa", "init.niter=null", base=base())
        theirs, _ = attach("pissa", "init.niter=exact", base=base())
        exact = factors_of(theirs)
        for name, (B, A) in factors_of(ours).items():
            product = exact[name][0] @ exact[name][1]
            assert (B @ A - product).norm() <= 1e-5 * product.norm(), name
        for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if "lora_" not in name:
                torch.testing.assert_close(one, two, rtol=0, atol=1e-5, msg=name)


def test_our_pissa_does_not_call_peft_s_svd(monkeypatch):
    """PEFT's exact SVD of 224 large matrices takes tens of minutes."""
    monkeypatch.setattr(from_peft, "get_peft_model", lambda *_, **__: pytest.fail("PEFT was asked"))
    _, start = attach("pissa", "init.niter=null")
    assert start.initial_factors.keys() == weights().keys(), "every layer was started all the same"


@pytest.mark.parametrize("niter", ["null", "16", "exact"])
def test_pissa_holds_the_best_rank_r_approximation(niter):
    """Eckart-Young: what is left of W is the tail of its spectrum."""
    model, _ = attach("pissa", f"init.niter={niter}")
    for name, (B, A) in factors_of(model).items():
        W = weights()[name]
        tail = torch.linalg.svdvals(W)[R:].norm()
        assert (W - S * B @ A).norm() <= (1.01 if niter == "16" else 1.0001) * tail, name


def test_olora_holds_the_first_columns_of_qr():
    model, _ = attach("olora")
    for name, (B, A) in factors_of(model).items():
        torch.testing.assert_close(B.T @ B, torch.eye(R), rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close((B @ A)[:, :R], weights()[name][:, :R], rtol=1e-4, atol=1e-5, msg=name)


def test_eva_holds_the_principal_components_of_the_answers_inputs():
    data = examples()
    model, start = attach("eva", data=data, batch=5)
    inputs = inputs_of(data, counted=True)
    for name, (B, A) in factors_of(model).items():
        X = torch.cat(inputs[name])
        Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False).Vh[:R]
        overlap = (A @ Vh.T).abs()
        torch.testing.assert_close(overlap.diagonal(), torch.ones(R), rtol=2e-2, atol=0, msg=name)
        assert not B.any()
    assert start.initial_factors == {}


def test_corda_is_the_svd_weighted_by_the_input_covariance():
    """s B A = [W C]_r C^-1 with PEFT's damped covariance C, whatever the batches are."""
    data = examples()
    model, _ = attach("corda", data=data, batch=5)
    for name, (B, A) in factors_of(model).items():
        W = weights()[name].double()
        scaled = [X.double() / X.double().max().abs() for X in inputs_of(data)[name]]
        covariance = sum(X.T @ X for X in scaled) / len(scaled)
        C = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        U, sigma, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        expected = U[:, :R] * sigma[:R] @ Vh[:R] @ torch.linalg.inv(C)
        assert (S * (B @ A).double() - expected).norm() <= 1e-2 * expected.norm(), name


def test_corda_s_two_methods_differ():
    (one, _), (two, _) = attach("corda"), attach("corda", "init.corda_method=kpm")
    name = "model.layers.0.mlp.up_proj"
    (B1, A1), (B2, A2) = factors_of(one)[name], factors_of(two)[name]
    assert (B2 @ A2).norm() < 0.5 * (B1 @ A1).norm()


@pytest.mark.parametrize("batch", [1, 5])
def test_peft_s_lora_ga_takes_our_mean_gradient(batch):
    """A = V[:r]^T, B = U[r:2r] S[r:2r] m^1/4 / sqrt(gamma): B carries the singular values, unlike the authors' code."""
    data = examples()
    gradients = autograd_gradients(random_llama(), data, "example")
    model, start = attach("lora_ga_peft", "init.stable_gamma=4", data=data, batch=batch)
    for name, (B, A) in factors_of(model).items():
        U, sigma, Vh = torch.linalg.svd(gradients[name], full_matrices=False)
        scale = len(B) ** 0.25 / 2
        torch.testing.assert_close((A @ Vh[:R].T).abs().diagonal(), torch.ones(R), rtol=1e-2, atol=0, msg=name)
        ratio = (B.T @ U[:, R : 2 * R]).abs().diagonal() / (sigma[R : 2 * R] * scale)
        torch.testing.assert_close(ratio, torch.ones(R), rtol=2e-2, atol=0, msg=name)
    assert (start.solution.examples.examples, start.solution.examples.tokens) == (5, 56)


# how they start, end and go on
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("choice", [*METHODS, "svd"])
def test_adapter_contains_what_the_base_loses(choice, dtype):
    """W' + s B A = W also with an adapter in 16 bit, whose factors are rounded."""
    model, _ = attach(choice, dtype=dtype)
    for name, layer in adapters.lora_layers(model).items():
        B, A = (part["default"].weight.detach().float() for part in (layer.lora_B, layer.lora_A))
        whole = layer.get_base_layer().weight + S * B @ A
        torch.testing.assert_close(whole, weights()[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("choice", METHODS)
def test_nothing_of_peft_s_wrapper_is_left(choice):
    """The base trains and saves as with any other method: plain LoRA, no stray gradient, hook or attribute."""
    base = random_llama().train()
    before = set(vars(base.model.layers[0].mlp.up_proj))
    model, _ = attach(choice, base=base)
    config = model.peft_config["default"]
    assert config.init_lora_weights is True and config.r == R and not config.rank_pattern
    assert not (config.eva_config or config.corda_config or config.lora_ga_config)
    assert base.training
    for layer in adapters.lora_layers(model).values():
        inner = layer.get_base_layer()
        assert set(vars(inner)) == before and not inner._forward_hooks and not inner._backward_hooks
        assert inner.weight.grad is None and not inner.weight.requires_grad


@pytest.mark.parametrize("choice", ["pissa", "lora_ga_peft"])
def test_start_depends_on_its_seed_alone(choice):
    """PEFT's randomised SVD draws from the global random numbers."""
    overrides = ["init.niter=1"] if choice == "pissa" else ["init.ga_direction=random"]
    torch.manual_seed(1)
    one = factors_of(attach(choice, *overrides)[0])
    base = random_llama()
    torch.manual_seed(2)
    torch.randn(100)
    two = factors_of(attach(choice, *overrides, base=base)[0])
    for name, (B, A) in one.items():
        assert torch.equal(B, two[name][0]) and torch.equal(A, two[name][1]), name


# what does not run
@pytest.mark.parametrize(
    ("choice", "module", "said"),
    [
        ("corda", "attr", r"init=corda needs attrs, not installed here: run pip install 'lora-one\[corda\]'"),
    ],
)
def test_missing_package_is_named(choice, module, said, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else "found")
    with pytest.raises(UsageError, match=said):
        build_init(run_config(f"init={choice}").init)


@pytest.mark.parametrize("option", ["dry_run=true", "overwrite=true"])
def test_a_missing_package_is_named_before_old_results_are_deleted(option, tmp_path, monkeypatch):
    """A dry run says so, too."""
    find_spec = importlib.util.find_spec
    run = small_run(tmp_path, "bundled/tiny", "init=corda", option)
    adapter = locate(run).folder.adapter / "adapter_model.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.write_text("of a finished run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "attr" else find_spec(name, *a))
    with pytest.raises(UsageError, match="init=corda needs attrs"):
        execute(run)
    assert adapter.read_text() == "of a finished run"


def test_eva_needs_answer_tokens():
    data = [Encoded(list(range(3, 12)), [-100] * 5 + [8, 9, 10, 11])] * 2
    with pytest.raises(RunError, match=r"init: EVA needs .* more answer tokens than peft\.lora_r=8.*raise init\.bsz"):
        attach("eva", data=data)


def test_eva_stops_with_an_error_without_convergence(monkeypatch):
    monkeypatch.setattr(from_peft, "EVA_PASSES", 1)
    with pytest.raises(RunError, match=r"init: EVA's components have not converged after 1 passes.*lower init\.tau"):
        attach("eva", "init.tau=0.9999999", "peft.lora_r=7", data=examples(20))


def test_layer_with_a_zero_gradient_is_named():
    model = random_llama()
    model.model.layers[1].mlp.down_proj.weight.zero_()  # so nothing reaches gate and up
    with pytest.raises(RunError, match=r"init: the gradient of layer .*layers\.1\.mlp\.(gate|up)_proj is zero"):
        attach("lora_ga_peft", base=model)


@pytest.mark.parametrize("choice", METHODS)
def test_weights_that_are_not_finite_are_an_error(choice):
    model = random_llama()
    model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        RunError, match=r"init: the (loss|weight of layer model\.layers\.0\.mlp\.up_proj).*(nan|finite)"
    ):
        attach(choice, base=model)
