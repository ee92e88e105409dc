"""What LoRA-Pro, LoRA-Muon and LoRA-RITE share: which parameters, groups, state, precision, batches, wrong use."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_one.errors import RunError, UsageError
from lora_one.optim import LoraMuon, LoraPro, LoraRite, create_pair_optimizer, create_scaled_optimizer, paired
from lora_one.optim.pairs import lora_pairs
from tests.helpers.factors import SCALINGS, SHAPES, backward, loss_of, scaled_layers, steps
from tests.helpers.models import random_llama, random_mixtral, random_roberta

CLASSES = [LoraPro, LoraMuon, LoraRite]
every_class = pytest.mark.parametrize("cls", CLASSES)


def peft_model(base=random_llama, **options):
    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base(), LoraConfig(**settings | options))


def with_head():
    return peft_model(random_roberta, target_modules=["query", "value"], task_type="SEQ_CLS")


# Which parameters
def test_factors_of_fused_experts_are_refused():
    """PEFT stores those of all experts in one A and one B, in different orders: their product is that of no layer."""
    model = peft_model(random_mixtral, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    for create, cls in ((create_pair_optimizer, LoraPro), (create_scaled_optimizer, torch.optim.AdamW)):
        with pytest.raises(
            UsageError, match=r"4 fused experts in one matrix, .*a LoraConfig without target_parameters"
        ):
            create(model, cls, lr=1e-3)


@pytest.mark.parametrize(
    ("model", "others"),
    [
        (lambda: peft_model(), 0),
        (lambda: peft_model(use_dora=True), 4),  # magnitudes
        (lambda: peft_model(bias="lora_only", lora_bias=True), 4),
        (lambda: peft_model(modules_to_save=["lm_head"]), 1),
        (lambda: peft_model(target_modules=["q_proj", "up_proj", "embed_tokens"]), 2),
        (with_head, 4),
    ],
    ids=["lora", "dora", "bias", "module", "embedding", "head"],
)
@every_class
def test_parameters_outside_pairs_are_stepped_by_adamw(cls, model, others):
    """Bitwise, with a learning rate of their own; the factors are not."""
    ours, theirs = model(), model()
    paired_ones = {id(factor) for pair in lora_pairs(ours) for factor in (pair.A, pair.B)}
    optimizer = create_pair_optimizer(ours, cls, lr=1e-2, others_lr=3e-3, weight_decay=0.1, eps=1e-7)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.1, eps=1e-7)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert len(groups["pairs"]["params"]) == 2 * len(lora_pairs(ours)) > 0
    assert len(groups["others"]["params"] if others else []) == others
    for _ in range(3):
        for index, (one, two) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            if one.requires_grad:
                one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(index))
                two.grad = one.grad.clone()
        optimizer.step()
        plain.step()
    start = dict(model().named_parameters())
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, two) == (id(one) not in paired_ones), name
        assert torch.equal(one, start[name]) == (not one.requires_grad), name


def test_scaling_of_each_pair_is_that_of_its_layer():
    """alpha / r, alpha / sqrt(r) with rsLoRA, each layer with its own rank and alpha."""
    scalings = {}
    for rslora in (False, True):
        model = peft_model(lora_alpha=16, use_rslora=rslora, rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 12})
        scalings[rslora] = {pair.layer.rpartition(".")[2]: pair.scaling for pair in lora_pairs(model)}
    assert scalings[False] == {"q_proj": 4.0, "up_proj": 6.0}
    assert scalings[True] == pytest.approx({"q_proj": 8.0, "up_proj": 12 / 2**0.5})
    assert all(pair.scaling == 1.0 for pair in lora_pairs(nn.ModuleList(scaled_layers())) if not pair.layer)


@pytest.mark.parametrize("cls", [LoraPro, LoraMuon])  # LoRA-RITE is published in terms of B A, without s
def test_steps_of_w_depend_on_s_b_a_alone(cls):
    """(B, A, s) and (s B, A, 1) are the same weights; with s in the wrong place their first steps would differ."""
    lr, moved = 1e-7, []
    for folded in (False, True):
        layers = scaled_layers(scalings=[1.0] * 4 if folded else SCALINGS)
        for layer, s in zip(layers, SCALINGS, strict=True):
            layer.B.data *= s if folded else 1
        before = [layer.scaling["default"] * (layer.B @ layer.A).detach() for layer in layers]
        steps(layers, create_pair_optimizer(layers, cls, lr=lr), 1)
        after = [layer.scaling["default"] * (layer.B @ layer.A).detach() for layer in layers]
        moved.append([(new - old) / lr for new, old in zip(after, before, strict=True)])
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-4)


@every_class
def test_pairs_without_gradients_are_skipped_and_keep_their_count(cls):
    layers = scaled_layers()
    optimizer = create_pair_optimizer(layers, cls, lr=0.1)
    steps(layers, optimizer, 1)
    before = copy.deepcopy(layers)
    backward(layers)
    layers[0].A.grad = layers[0].B.grad = layers[1].A.grad = None
    optimizer.step()
    moved = [not torch.equal(old.B, new.B) for old, new in zip(before, layers, strict=True)]
    assert moved == [False, False, True, True] and torch.equal(before[1].A, layers[1].A)
    assert [int(optimizer.state[layer.B]["step"]) for layer in layers] == [1, 1, 2, 2]
    steps(layers, optimizer, 1)  # layers 0 and 2 have one shape and different counts


# Batches
@every_class
def test_layers_in_one_batch_take_the_steps_they_take_alone(cls, monkeypatch):
    """LoRA-RITE without its joint clipping."""
    options = {"max_norm": 0.0} if cls is LoraRite else {}
    results = []
    for largest in (32, 1):
        monkeypatch.setattr(paired, "LARGEST_BATCH", largest)
        layers = scaled_layers()
        results.append(steps(layers, create_pair_optimizer(layers, cls, lr=0.02, **options), 4))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
    alone = scaled_layers()
    optimizers = [create_pair_optimizer(nn.ModuleList([layer]), cls, lr=0.02, **options) for layer in alone]
    for _ in range(4):
        backward(alone)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(list(alone.parameters()), results[0], rtol=1e-9, atol=1e-10)


class Waits(TorchDispatchMode):
    """Counts operations after which the host would wait for a GPU; ``known``: tensors that are always on the CPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_linalg_eigh", "linalg_cholesky", "linalg_qr")

    def __init__(self, known):
        super().__init__()
        self.known, self.count = {tensor.data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        waits = operation.overloadpacket.__name__ in self.NAMES and arguments[0].data_ptr() not in self.known
        self.count += waits
        return operation(*arguments, **keywords or {})


@pytest.mark.parametrize(("cls", "most"), [(LoraPro, 2), (LoraMuon, 0), (LoraRite, 6)])
def test_the_host_waits_as_often_for_many_layers_as_for_one(cls, most):
    """Once per eigendecomposition of a stack; never in LoRA-Muon, which has none."""
    for layers in (1, 6):
        model = scaled_layers(torch.float32, SHAPES[:1] * layers, SCALINGS[:1] * layers)
        optimizer = create_pair_optimizer(model, cls, lr=1e-3)
        steps(model, optimizer, 1)
        backward(model)
        with Waits([state["step"] for state in optimizer.state.values()]) as waits:
            optimizer.step()
        assert waits.count == most


# An ordinary torch optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_class
def test_state_is_saved_and_loaded_bitwise(cls, dtype):
    """Saved after two steps, loaded with weights_only into a new one; the state of bf16 factors stays in fp32."""
    layers = scaled_layers(dtype)
    optimizer = create_pair_optimizer(layers, cls, lr=0.05, weight_decay=0.1)
    steps(layers, optimizer, 2)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "layers": layers.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = scaled_layers(dtype)
    again.load_state_dict(saved["layers"])
    resumed = create_pair_optimizer(again, cls, lr=7e-3)  # the rates are loaded too
    resumed.load_state_dict(saved["optimizer"])
    states = [state for state in resumed.state.values() if state]
    wide = {"exp_avg_sq_A": torch.float64, "exp_avg_sq_B": torch.float64} if cls is LoraRite else {}
    assert len(states) == len(layers)
    assert all(tensor.dtype == wide.get(name, torch.float32) for state in states for name, tensor in state.items())
    assert all(map(torch.equal, steps(layers, optimizer), steps(again, resumed)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@every_class
def test_deepcopy_with_its_model_takes_the_same_steps(cls, copied):
    layers = scaled_layers()
    optimizer = create_pair_optimizer(layers, cls, lr=0.05)
    steps(layers, optimizer, 2)
    twin, its_optimizer = copied((layers, optimizer))
    assert all(map(torch.equal, steps(layers, optimizer), steps(twin, its_optimizer)))


@every_class
def test_schedule_reaches_both_groups(cls):
    model = peft_model(use_dora=True)
    optimizer = create_pair_optimizer(model, cls, lr=0.1, others_lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert all(map(torch.equal, before, model.parameters()))


@every_class
def test_hooks_run_once_a_step_and_gradients_stay_as_they_are(cls):
    layers = scaled_layers()
    torch.optim.AdamW(scaled_layers().parameters())  # from now on torch hooks this class's own step
    optimizer = create_pair_optimizer(layers, cls, lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    loss = optimizer.step(lambda: backward(layers))
    assert seen == ["before", "after"] and loss.item() == pytest.approx(backward(scaled_layers()).item())
    raw = scaled_layers()
    backward(raw)
    for one, two in zip(layers.parameters(), raw.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@every_class
def test_accelerate_prepares_it(cls):
    from accelerate import Accelerator

    layers, other = scaled_layers(torch.float32), scaled_layers(torch.float32)
    expected = steps(other, create_pair_optimizer(other, cls, lr=0.1), 3)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(layers, create_pair_optimizer(layers, cls, lr=0.1))
    steps(prepared, optimizer, 3)
    assert all(map(torch.equal, layers.parameters(), expected))


# Precision
@every_class
def test_bf16_factors_are_stepped_in_fp32(cls):
    """Against the same start in fp64: the result is rounded once, at the end."""
    layers = scaled_layers(torch.bfloat16)
    wide = copy.deepcopy(layers).double()
    wide.targets = [target.double() for target in layers.targets]
    backward(layers)
    for one, two in zip(layers.parameters(), wide.parameters(), strict=True):
        two.grad = one.grad.double()
    for each in (layers, wide):
        create_pair_optimizer(each, cls, lr=0.02).step()
    for one, two in zip(layers.parameters(), wide.parameters(), strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), two, rtol=2**-8, atol=1e-5)


@every_class
def test_autocast_does_not_reach_the_step(cls):
    layers, other = scaled_layers(torch.float32), scaled_layers(torch.float32)
    expected = steps(other, create_pair_optimizer(other, cls, lr=0.1), 1)
    backward(layers)
    optimizer = create_pair_optimizer(layers, cls, lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step()
    assert all(map(torch.equal, layers.parameters(), expected))


# Wrong use
@every_class
def test_a_pair_with_one_frozen_factor_is_refused(cls):
    model = peft_model()
    frozen = next(name for name, _ in model.named_parameters() if "lora_A" in name)
    model.get_parameter(frozen).requires_grad_(False)
    said = (
        rf"{cls.__name__} computes .* in {frozen.partition('.lora_A')[0]} only lora_B is trained: train lora_A as well"
    )
    with pytest.raises(UsageError, match=said):
        create_pair_optimizer(model, cls, lr=0.1)


@every_class
def test_a_model_without_pairs_is_refused(cls):
    with pytest.raises(UsageError, match=rf"no layer has both .*{cls.__name__} has nothing to step: use AdamW"):
        create_pair_optimizer(nn.Linear(3, 3), cls, lr=0.1)


@every_class
def test_a_learning_rate_of_its_own_for_b_is_refused(cls):
    layers = scaled_layers()
    groups = [{"params": [getattr(layer, name) for layer in layers], "lr": lr} for name, lr in (("A", 1), ("B", 2))]
    with pytest.raises(UsageError, match=r"factors of 0 are in different parameter groups.*LoRA\+"):
        cls(groups, lora_pairs(layers), lr=0.1)


@every_class
def test_replaced_parameters_are_an_error(cls):
    layers = scaled_layers()
    optimizer = create_pair_optimizer(layers, cls, lr=0.1)
    optimizer.param_groups[0]["params"] = [nn.Parameter(p.detach().clone()) for p in layers.parameters()]
    with pytest.raises(RunError, match=r"factors of 0 are no longer parameters .* wrap or shard the model first"):
        optimizer.step()


@every_class
def test_a_factor_that_is_not_finite_does_not_go_unnoticed(cls):
    """Some decompositions raise for NaN; otherwise the other factor becomes NaN, at which the run stops."""
    layers = scaled_layers()
    backward(layers)
    layers[3].B.data[0, 0] = float("nan")
    try:
        create_pair_optimizer(layers, cls, lr=0.1).step()
    except RunError as error:
        assert "factors of 3 are not finite" in str(error)
    else:
        assert layers[3].A.isnan().any()


def test_a_decomposition_that_fails_names_the_layer(monkeypatch):
    layers = scaled_layers()
    backward(layers)
    layers[3].B.data[0, 0] = float("nan")

    def fails(K):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr("lora_one.optim.lora_pro.eigen", fails)
    with pytest.raises(RunError, match=r"factors of 3 are not finite: .*lower the learning rate"):
        create_pair_optimizer(layers, LoraPro, lr=0.1).step()


@pytest.mark.parametrize("fused", [False, True])
@every_class
def test_grad_scaler_passes_unscaled_gradients_and_skips_overflow(cls, fused):
    """With fused=True torch's AdamW leaves both to its kernel, which does not see the pairs."""
    layers, other = scaled_layers(torch.float32), scaled_layers(torch.float32)
    optimizer = create_pair_optimizer(layers, cls, lr=0.01, fused=fused)
    expected = steps(other, create_pair_optimizer(other, cls, lr=0.01, fused=fused), 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, 1.0, float("inf")):
        layers.zero_grad()
        scaler.scale(loss_of(layers) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(map(torch.equal, layers.parameters(), expected))


@pytest.mark.parametrize("option", ["maximize", "amsgrad"])
@every_class
def test_what_pairs_do_not_have_is_refused(cls, option):
    with pytest.raises(UsageError, match=rf"{option}=True: {cls.__name__} does not have it for LoRA pairs"):
        create_pair_optimizer(scaled_layers(), cls, lr=0.1, **{option: True})
