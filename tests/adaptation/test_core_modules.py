"""The r x r architecture of LoRA-SB and LoRA-XS: only R trains, and what is left is plain LoRA."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lora_one import config
from lora_one.adaptation import checkpoints
from lora_one.adaptation import layers as adapters
from lora_one.adaptation.merging import merge_adapter
from lora_one.errors import UsageError
from lora_one.models import load_model
from lora_one.runs import experiment
from tests.helpers.examples import autograd_gradients, examples
from tests.helpers.models import random_llama
from tests.helpers.runs import LOGITS, attach, finish, logits_at_saving, run_config, small_run, straight_and_resumed

SB, XS = "init.direction=LoRA-SB", "init=lora_xs"
IDS = torch.arange(2, 40).reshape(1, -1)
both = pytest.mark.parametrize("method", [SB, XS])


def attached(method, *overrides, model=None):
    eta = ["init.eta=0.01"] if method == SB else []
    run = run_config(method, *eta, *overrides)
    return attach(model or random_llama(), run)


def shaken(model, size=0.05):
    """As after some training: R away from its start."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@both
def test_only_the_cores_train(method):
    model, _ = attached(method)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 14 and all(p.shape == (8, 8) and p.dtype == torch.float32 for p in trainable.values())
    assert adapters.trainable_parameters(model) == 14 * 8**2
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.requires_grad_(True)  # even then: B and A are no parameters
    assert not any(".lora_A." in name or name.endswith(".B") for name, _ in model.named_parameters())
    model, _ = attached(method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trainable)


@both
def test_layer_is_w_plus_s_b_r_a(method):
    """The adapted layer's output, and its gradient in R, are those of W_eff = W + s B R A written out."""
    model, _ = attached(method, "peft.lora_alpha=24", "peft.use_rslora=false")
    layer = next(iter(adapters.lora_layers(shaken(model)).values()))
    W = layer.get_base_layer().weight
    B, R, A = layer.lora_B["default"].B, layer.lora_B["default"].R, layer.lora_A["default"].weight
    s = 1.0 if method == SB else 3.0
    assert layer.scaling["default"] == s
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    expected = x @ (W + s * B @ R @ A).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    (ours,) = torch.autograd.grad(layer(x).square().sum(), R)
    (theirs,) = torch.autograd.grad(expected.square().sum(), R)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_lora_sb_starts_one_sign_step_ahead():
    """Through the whole chain, from every layer's own gradient; W itself is unchanged."""
    data, base = examples(), random_llama()
    gradients = autograd_gradients(random_llama(), data, "example")
    run = run_config(SB, "init.eta=0.01")
    weights = {name: layer.weight.clone() for name, layer in adapters.target_layers(base, run.peft).items()}
    model, start = attach(base, run, data)
    for name, layer in adapters.lora_layers(model).items():
        step = -0.01 * torch.sign(gradients[name])
        U, S, Vh = torch.linalg.svd(step, full_matrices=False)
        expected = U[:, :8] * S[:8] @ Vh[:8]
        moved = (layer.get_delta_weight("default")).detach()
        assert (moved - expected).norm() < 0.02 * expected.norm(), name  # a sign may flip where G is nearly 0
        assert torch.equal(layer.get_base_layer().weight, weights[name])
        assert start.relative_shift[name] == pytest.approx((moved.norm() / weights[name].norm()).item(), rel=1e-4)
        share = (S[:8].square().sum() / S.square().sum()).item()
        assert start.solution.energies[name] == pytest.approx(share, rel=1e-2)


def test_lora_xs_starts_nearly_at_the_pretrained_function():
    model, start = attached(XS)
    with torch.no_grad():
        ours, theirs = model.eval()(IDS).logits, random_llama()(IDS).logits
    assert 0 < (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
    assert all(0 < shift < 1e-3 for shift in start.relative_shift.values())


@both
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_merged_and_saved_are_the_trained_model(method, dtype, tmp_path):
    """adapter/ is plain LoRA of rank r; so is what merging adds, whatever the adapter's own dtype."""
    run = run_config(method, *(["init.eta=0.01"] if method == SB else []))
    model, _ = attach(random_llama(), run)
    if dtype == "bf16":
        for layer in adapters.lora_layers(model).values():
            layer.lora_A["default"].bfloat16()
            layer.lora_B["default"].bfloat16()
    shaken(model)
    layers = adapters.lora_layers(model).items()
    products = {
        name: (layer.lora_B["default"].B.double() @ layer.lora_B["default"].R.double(), layer.lora_A["default"].weight)
        for name, layer in layers
    }
    checkpoints.save_adapter(model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(saved) == 28
    for name, (B, A) in products.items():
        prefix = f"base_model.model.{name}"
        torch.testing.assert_close(saved[f"{prefix}.lora_B.weight"].double(), B, rtol=1e-5, atol=1e-7)
        assert torch.equal(saved[f"{prefix}.lora_A.weight"], A.float())
    reloaded = checkpoints.load_adapter(random_llama(), tmp_path / "adapter").eval()
    expected = reloaded(IDS).logits
    if dtype == "fp32":
        assert (model(IDS).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (random_llama()(IDS).logits - expected).abs().max() > 1e-2 * expected.abs().max()
    merged = merge_adapter(model)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert (merged(IDS).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@both
def test_whole_run_loads_with_plain_peft(method, tmp_path, llama_folder, monkeypatch):
    trained = logits_at_saving(monkeypatch, IDS)
    folder = finish(small_run(tmp_path, llama_folder, method, "model.learning_rate=0.05", "model.saving=true"))
    arguments = [str(llama_folder), str(folder.adapter), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", LOGITS, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    loaded = torch.load(tmp_path / "logits.pt", weights_only=True)
    bound = 1e-4 * loaded.abs().max()
    assert (loaded - trained["trained"]).abs().max() <= bound
    with torch.no_grad():
        assert (load_model(str(folder.merged))(IDS).logits - loaded).abs().max() <= bound
        assert (load_model(str(llama_folder))(IDS).logits - loaded).abs().max() > 100 * bound
    record = folder.read()
    assert record["trainable_parameters"] == 14 * 8**2
    named = "LoRA-SB-r8-lr0.05-" if method == SB else "LoRA-XS-r8-a16-lr0.05-"
    assert folder.path.parent.name == named + record["config_hash"][:8]
    if method == SB:
        assert record["init"]["eta"] == 0.05, "3 % of 6 steps is one step of warm-up"
        assert record["init"]["loss_after"] != record["init"]["loss_before"]


@both
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resumes_bitwise_after_a_kill_between_checkpoints(method, dtype, tmp_path, llama_folder, monkeypatch):
    """Two epochs with dropout, stopped after the first one's checkpoint: B, R and A come back bit for bit."""
    changes = (method, "model.epochs=2", "peft.lora_dropout=0.1", f"init.dtype={dtype}")
    straight, resumed = straight_and_resumed(tmp_path, llama_folder, changes, monkeypatch)
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (straight.adapter / name).read_bytes()
    assert resumed.read()["train"]["last_loss"] == straight.read()["train"]["last_loss"]
    assert resumed.read()["evaluation"]["final"] == straight.read()["evaluation"]["final"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["peft=lora_xs"], r"peft\.lora_xs=True trains an r x r core, which LoRA-One does not.*remove peft=lora_xs"),
        (
            ["peft=lora_xs", "init=default"],
            r"peft\.lora_xs=True.*which LoRA does not initialise: set init=lora_sb or lora_xs",
        ),
        (["peft=lora_xs", "init.direction=LoRA-GA"], "which LoRA-GA does not initialise"),
        (
            [SB, "peft.use_loraplus=true"],
            r"peft\.use_loraplus=True.*LoRA-SB trains only R: set peft\.use_loraplus=false",
        ),
        (
            [XS, "peft.use_loraplus=true"],
            r"peft\.use_loraplus=True.*LoRA-XS trains only R: set peft\.use_loraplus=false",
        ),
        ([SB, "init.scale=unit"], r"init\.scale=unit is used only by LoRA-One and LoRA-GA, not by LoRA-SB: remove it"),
        (
            [SB, "init.stable_gamma=128"],
            r"init\.stable_gamma=128 is used only by LoRA-One and LoRA-GA, not by LoRA-SB: remove it",
        ),
        ([SB, "init.normalize=none"], r"init\.normalize=none is used only by LoRA-One, not by LoRA-SB: remove it"),
        ([SB, "init.ga_direction=ArBr"], r"init\.ga_direction=ArBr is used only by LoRA-GA, not by LoRA-SB: remove it"),
        (["init.eta=0.1"], r"init\.eta=0\.1 is used only by LoRA-SB, not by LoRA-One: remove it"),
        ([SB, "init.eta=0"], r"init\.eta=0\.0 is out of range: it must be positive"),
        ([XS, "init.lora_R_std=-1"], r"init\.lora_R_std=-1\.0 is out of range"),
        ([XS, "+init.eta=1"], r"unknown key init\.eta"),
    ],
)
def test_rejects_contradictory_settings_with_one_line(changes, message):
    with pytest.raises(UsageError, match=message) as refused:
        run_config(*changes)
    assert "\n" not in str(refused.value)


def test_peft_lora_xs_only_repeats_what_the_method_chooses():
    """The same configuration, hence the same folder; for LoRA-SB whatever alpha is."""
    assert run_config(SB, "peft=lora_xs").to_dict() == run_config(SB).to_dict()
    assert run_config(XS, "peft=lora_xs").to_dict() == run_config(XS).to_dict()
    assert run_config(SB, "peft.lora_alpha=64").to_dict() == run_config(SB).to_dict()
    assert run_config(XS, "peft.lora_alpha=64").to_dict() != run_config(XS).to_dict()
    assert not run_config().peft.lora_xs and config.with_core(run_config()) == run_config()


@both
def test_plan_counts_the_cores(method, tmp_path, llama_folder, capsys):
    experiment.execute(small_run(tmp_path, llama_folder, method, "dry_run=true"))
    printed = capsys.readouterr().out
    assert "14 layers, 896 trainable parameters" in printed
    assert ("LoRA-SB-r8-lr0.005, scaling 1\n" if method == SB else "LoRA-XS-r8-a16-lr0.005, scaling 5.657") in printed


def test_given_eta_is_in_the_name():
    from lora_one.records.folder import method_name

    assert method_name(run_config(SB, "init.eta=0.001")) == "LoRA-SB-r8-eta0.001-lr0.005"
