"""What trains beside or instead of adapters: every weight, embeddings, a share of the width as rank; seeds apart."""

import pytest
import torch

from lora_one.adaptation.layers import target_layers
from lora_one.errors import UsageError
from lora_one.models import check_positions, preflight, requirements, weight_shape, with_rank
from lora_one.runs.experiment import execute
from tests.helpers.models import random_llama, random_roberta
from tests.helpers.runs import run_config


def test_a_relative_rank_is_a_share_of_the_width(llama_folder):
    run = with_rank(run_config(f"model.name={llama_folder}", "peft.lora_relative_r=0.1", "init.direction=LoRA-SB"))
    assert run.peft.lora_r == 3, "of a width of 32"
    assert run.peft.lora_alpha == 3, "LoRA-SB has s = 1 whatever the rank"
    assert with_rank(run_config(f"model.name={llama_folder}")).peft.lora_r == 8


def test_learnt_positions_bound_the_length(tokenizer):
    model = random_roberta(len(tokenizer))
    check_positions(model, run_config("model.max_length=64").model)
    with pytest.raises(
        UsageError, match=r"model\.max_length=65 is more than the 64 position embeddings .* model\.max_length=64"
    ):
        check_positions(model, run_config("model.max_length=65").model)
    check_positions(random_llama(), run_config("model.max_length=4096").model)  # rotary ones are not learnt


@pytest.mark.parametrize("targets", ["all", "[q_proj,v_proj]"])
def test_weights_with_full_size_moments_are_counted_without_loading(targets, llama_folder):
    peft = run_config(f"peft.lora_target_modules={targets}", "peft.lora_r=2").peft
    shapes = [weight_shape(layer) for layer in target_layers(random_llama(), peft).values()]
    found = requirements.adapted_parameters(str(llama_folder), peft.lora_target_modules)
    assert found == sum(m * n for m, n in shapes)


def test_full_size_moments_need_memory(monkeypatch):
    """7B in bf16: 16.8 GB for AdamW; two fp32 moments of at least half of the weights are 28 GB more."""
    monkeypatch.setattr(requirements, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(requirements, "free_bytes", lambda: 40e9)
    model = run_config("model.name=someone/model-7b-hf", "model.bf16=true").model
    preflight(model)
    preflight(model, full_size_moments=["q_proj"])  # unknown without its files
    with pytest.raises(
        UsageError, match=r"needs at least 44\.8 GB, of which 28\.0 GB are moments .*optimizer=adamw.*preflight=false"
    ):
        preflight(model, full_size_moments="all")


def test_a_run_is_refused_before_it_loads_anything(monkeypatch, llama_folder, tmp_path):
    run = run_config(
        f"model.name={llama_folder}", "optimizer=lora_pro", "dataset.accuracy_examples=0", f"results_dir={tmp_path}"
    )
    without = 1.2 * requirements.weight_bytes(run.model) * requirements.count_parameters(str(llama_folder))
    monkeypatch.setattr(requirements, "free_bytes", lambda: 1.01 * without)
    monkeypatch.setattr("lora_one.models.load_model", None)
    with pytest.raises(UsageError, match="are moments of the size of the adapted weights"):
        execute(run)


def test_the_model_of_an_earlier_job_is_freed_before_a_model_is_refused(monkeypatch):
    free = [1e9]
    monkeypatch.setattr(requirements, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(requirements, "free_bytes", lambda: free[0])
    monkeypatch.setattr(requirements, "free_memory", lambda: free.insert(0, 20e9))
    model = run_config("model.name=someone/model-7b-hf", "model.bf16=true").model
    preflight(model)
    monkeypatch.setattr(requirements, "free_memory", lambda: free.insert(0, 10e9))
    free.insert(0, 1e9)
    with pytest.raises(UsageError, match=r"only 10\.0 GB are free"):
        preflight(model)
