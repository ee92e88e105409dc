"""The search for gamma on real models: against a grid, and never above the loss before."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from lora_one.adaptation.layers import lora_layers, put
from lora_one.initialization.forward_batches import batches_loss, forward_batches
from lora_one.initialization.methods import build_init
from lora_one.initialization.start import attach_adapters
from lora_one.records.folder import RunFolder
from lora_one.runs.parts import load_base, load_parts
from tests.helpers.paths import ROOT, real_model
from tests.helpers.runs import finish, run_config

SHARED = ROOT.parent / "shared"
GSM8K = (f"dataset.path={SHARED / 'data/gsm8k'}", "dataset.max_train_samples=448", "dataset.max_eval_samples=20")
HEAD = ("model=roberta_large", "dataset.max_train_samples=400", "dataset.max_eval_samples=20")
ALL = [2 ** (k / 2) for k in range(2, 33)]  # 2 to 65,536 by factors of the square root of 2


def settings(name):
    """The overrides of a case, and the gammas of its grid."""
    if name == "bundled":
        return (), ALL
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not here")
    if name == "stories260K":
        model = SHARED / "models/stories260K-hf"
        return ("experiment=stories_gsm8k", f"model.name={model}", "model.max_length=256", *GSM8K), ALL
    if name == "minilm":
        model = real_model("minilm-l6")
        return (*HEAD, f"model.name={model}", "dataset=mrpc", f"dataset.path={SHARED / 'data/glue/MRPC'}"), ALL
    model = real_model("gemma-3-270m-hf")
    overrides = ("model=llama", f"model.name={model}", "model.bf16=false", "model.max_length=512", "dataset=gsm8k")
    # a pass takes many seconds: only the middle of the grid, around the minimum that the whole one has
    return (*overrides, *GSM8K), [gamma for gamma in ALL if 1000 < gamma < 3000]


every_model = pytest.mark.parametrize(
    "name", ["bundled", "stories260K", "minilm", pytest.param("gemma", marks=pytest.mark.long)]
)


@pytest.mark.slow
@every_model
@torch.no_grad()
def test_search_reaches_the_least_loss_of_a_grid(name):
    """Within 1 % of it, on the gradient's own examples, by at most 4 evaluations, and below the loss before."""
    overrides, grid = settings(name)
    run = run_config(*overrides, "seed=1", "init.scale=search", "init.search_examples=0")
    parts = load_parts(run, RunFolder(Path("no run")))
    base, probe = load_base(parts), parts.probe
    model, start = attach_adapters(base, parts.adaptation, build_init(run.init), probe, seed=1)
    solution, layers, forward = start.solution, lora_layers(model), forward_batches(model, probe.batches)
    assert 2 <= len(solution.searched) <= 4

    def loss_at(gamma):
        root = math.sqrt(solution.gamma / gamma)
        for layer, found in solution.factors.items():
            put(layers[layer], dataclasses.replace(found, B=found.B * root, A=found.A * root))
        return batches_loss(model, forward, probe.reduction)

    assert solution.loss <= 1.01 * min(map(loss_at, grid))
    assert solution.loss < solution.examples.loss


@pytest.mark.slow
@every_model
def test_the_default_start_raises_no_loss_on_its_examples(name, tmp_path):
    """By seeds 1 to 3 of each model, Gemma's by one."""
    overrides, _ = settings(name)
    for seed in (1,) if name == "gemma" else (1, 2, 3):
        short = ("model.epochs=0", "dataset.accuracy_examples=0")
        record = finish(run_config(f"results_dir={tmp_path}", *overrides, *short, f"seed={seed}")).read()["init"]
        assert record["searched"]["other_examples"] == (32 if name == "minilm" else 8), "a head has one answer each"
        assert all("almost no step" in warning for warning in record["warnings"])
        assert record["loss_after"] <= record["loss_before"]
