"""The forecast of what a forward pass keeps, against what PEFT's model really keeps."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_one.adaptation.layers import target_layers
from lora_one.model_kinds import MODEL_KINDS
from lora_one.models import auto_class, load_skeleton, weight_shape
from lora_one.optim import build_optimizer
from lora_one.records.folder import RunFolder
from lora_one.runs import memory_forecast
from lora_one.runs.memory_forecast import activation_bytes, groups_of_inputs, state_bytes
from lora_one.runs.plan import plan
from tests.helpers.models import random_llama, random_mixtral, random_reader_of_images, random_roberta, random_t5
from tests.helpers.runs import run_config
from tests.helpers.training import adapted

MODELS = {
    "CausalLM": random_llama,
    "ConditionalGeneration": random_t5,
    "SequenceClassification": random_roberta,
}


def really_kept(config, kind, targets, rows, length, dtype, *, checkpointing=False):
    """Bytes of the storages that autograd holds after a real forward pass, its weights left out."""
    model = auto_class(kind).from_config(config, dtype=dtype).requires_grad_(targets is None)
    if targets is not None:
        lora = LoraConfig(r=2, target_modules=targets, task_type=MODEL_KINDS[kind].task_type)
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    own = {part.untyped_storage().data_ptr() for part in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "ConditionalGeneration":
        batch["decoder_input_ids"] = ids
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**batch, use_cache=False)  # noqa: F841 (it holds the graph)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("full", [False, True])
def test_forecast_matches_the_stored_activations(kind, dtype, full):
    model = MODELS[kind]()
    targets = None if full else list(target_layers(model, run_config("peft.lora_r=2").peft))
    forecast = activation_bytes(model.config, kind, targets, 2, 48, dtype)
    real = really_kept(model.config, kind, targets, 2, 48, dtype)
    assert 0.95 * real < forecast < 1.3 * real, (forecast, real)
    fewer = activation_bytes(model.config, kind, targets, 2, 48, dtype, checkpointing=True)
    assert fewer < 0.8 * forecast


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1.5), (torch.bfloat16, 1.3)])
def test_a_mixture_of_experts_has_a_forecast(dtype, most):
    """In fp32 from bf16, where norms and probabilities are fp32 too, and then counted twice."""
    config, names = random_mixtral().config, ["q_proj", "v_proj"]
    targets = [f"model.layers.0.self_attn.{name}" for name in names]
    forecast = activation_bytes(config, "CausalLM", targets, 2, 48, dtype)
    real = really_kept(config, "CausalLM", names, 2, 48, dtype)
    assert 0.9 * real < forecast < most * real, (forecast, real)
    assert groups_of_inputs(config, "CausalLM", targets) == [targets]


def test_a_model_that_also_reads_images_has_a_forecast():
    """Its vision tower draws weights and reads them while it is made, which tensors without data do not allow."""
    model = random_reader_of_images()
    targets = list(target_layers(model, run_config("peft.lora_r=2").peft))
    forecast = activation_bytes(model.config, "CausalLM", targets, 2, 48, torch.float32)
    real = really_kept(model.config, "CausalLM", targets, 2, 48, torch.float32)
    assert 0.9 * real < forecast < 1.3 * real, (forecast, real)


def test_memory_is_proportional_to_the_examples():
    config = random_llama().config
    targets = list(target_layers(random_llama(), run_config("peft.lora_r=2").peft))
    one, four = (activation_bytes(config, "CausalLM", targets, rows, 32, torch.float32) for rows in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "lora_pro", "lora_muon", "lora_rite"])
def test_forecast_of_the_optimizer_matches_its_state(optimizer):
    """Weights, gradients and everything in the state after a step. LoRA-Pro's moments have the size of the weights."""
    run = run_config(f"optimizer={optimizer}", "peft.lora_r=2", "init=gaussian")
    model = adapted(run)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stepper = build_optimizer(model, run)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    stepper.step()
    real = 8 * sum(parameter.numel() for parameter in trained)
    real += sum(tensor.nbytes for state in stepper.state.values() for tensor in state.values())
    shapes = [weight_shape(layer) for layer in target_layers(random_llama(), run.peft).values()]
    within_a_step = 8 * max(m * n for m, n in shapes) * run.optimizer.full_size_moments
    forecast = state_bytes(run.optimizer, sum(parameter.numel() for parameter in trained), shapes)
    full_size = 8 * sum(m * n for m, n in shapes)
    assert 0.95 * real <= forecast - within_a_step <= 1.4 * real
    assert (forecast > full_size) == (optimizer == "lora_pro")


def test_the_plan_counts_full_size_moments(tmp_path):
    """8 bytes for each weight of the adapted layers, and for the largest one again within a step."""
    optimizers = {}
    for name in ("adamw", "lora_pro"):
        run = run_config(f"optimizer={name}", "dataset.train_size=80", "dataset.validation_size=8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lora_one.runs.plan.GB", 1.0)
            said = plan(run, RunFolder(tmp_path))
        optimizers[name] = float(re.search(r"optimizer ([\d.]+)", said)[1])
    skeleton = load_skeleton(run.model.name, None, run.model.type)
    shapes = [weight_shape(layer) for layer in target_layers(skeleton, run.peft).values()]
    sizes = [m * n for m, n in shapes]
    assert optimizers["lora_pro"] - optimizers["adamw"] == 8 * (sum(sizes) + max(sizes))


def test_equal_jobs_of_a_sweep_share_the_forecast(monkeypatch):
    passes, original = [], memory_forecast._kept
    monkeypatch.setattr(memory_forecast, "_kept", lambda *a, **k: passes.append(a) or original(*a, **k))
    config, targets = random_llama().config, ["model.layers.0.mlp.up_proj"]

    def forecast(length, checkpointing=False, targets=targets):
        options = {"checkpointing": checkpointing}
        return activation_bytes(config, "CausalLM", targets, 1, length, torch.float32, **options)

    assert forecast(31) == forecast(31) and len(passes) == 1
    assert len({forecast(31), forecast(33), forecast(31, checkpointing=True), forecast(31, targets=None)}) == 4
    config.intermediate_size *= 2
    assert forecast(31) > 0 and len(passes) == 5
