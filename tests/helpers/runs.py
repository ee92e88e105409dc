"""Configurations, starts and whole runs of some seconds."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from lora_one.adaptation.protocol import Adaptation
from lora_one.adaptation.selection import adaptation_of
from lora_one.config import RunConfig
from lora_one.config.defaults import defaults_of
from lora_one.config.methods import METHODS, MethodSettings
from lora_one.data.encode import batches_of
from lora_one.initialization.low_rank_step import StepSettings, factorised
from lora_one.initialization.methods import build_init
from lora_one.initialization.moments import Moments
from lora_one.initialization.solution import Probe
from lora_one.initialization.start import attach_adapters
from lora_one.models import BUNDLED
from lora_one.records.folder import RunFolder
from lora_one.runs import experiment, initial_model
from lora_one.training.callbacks import Recorder
from tests.helpers.examples import examples
from tests.helpers.models import random_llama
from tests.helpers.paths import ROOT


def attach(model, run, data=None):
    probe = Probe(batches_of(data or examples(), 2, 0), "example")
    return attach_adapters(model, adaptation_for(run), build_init(run.init), probe, seed=0)


# of conf/init: all but those that change the weights themselves
ADAPTER_INITS = sorted(
    path.stem
    for path in (ROOT / "conf/init").glob("[!_]*.yaml")
    if not METHODS.get(defaults_of(path.stem).get("method"), MethodSettings).steps_weights
)
SHORT = ("model.epochs=1", "model.max_length=64")
PUBLISHED = {
    "first": "++init.direction=LoRA-One",
    "meta_math": "++dataset_name=meta_math model.epochs=1 model.eval_epochs=1 ++model.saving=true +init=gradient "
    "++peft.lora_r=8 +peft=all wandb.name=enter-name-here ++init.weight=stable peft.use_rslora=True "
    "peft.lora_alpha=16 ++init.stable_gamma=128 model.learning_rate=2e-4 ++seed=9 ++init.direction=LoRA-One",
    "commonsense, on another data set": "model.epochs=3 model.eval_epochs=3 ++model.saving=false "
    "model.real_batch_size=16 ++dataset_name=gsm8k +init=gradient ++init.direction=LoRA-One ++init.max_length=256 "
    "++model.max_length=256 ++peft.lora_r=16 +peft=qv wandb.name=enter-name-here ++init.scale=stable "
    "peft.use_rslora=True peft.lora_alpha=16 ++peft.lora_dropout=0.05 ++init.stable_gamma=128 "
    "model.learning_rate=5e-5 ++seed=42",
}
SMALL = [
    "wandb.mode=disabled",
    "dataset.train_size=41",  # a last batch of one example: one of two processes has none
    "dataset.validation_size=8",
    "dataset.accuracy_examples=0",
    "dataset.max_new_tokens=8",
    "model.real_batch_size=8",
    "model.per_device_batch_size=4",
]
LOGITS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
torch.save(model(torch.arange(2, 40).reshape(1, -1)).logits.detach(), sys.argv[3])
"""


def stop_at(monkeypatch, step):
    """Make training raise KeyboardInterrupt after it has logged this step."""
    original = Recorder.on_log

    def stop(self, args, state, control, logs=None, **rest):
        original(self, args, state, control, logs, **rest)
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "on_log", stop)


def straight_and_resumed(tmp_path, model, changes, monkeypatch):
    """The folders of one run without interruption and of one stopped at step 9, then started again."""
    straight = finish(small_run(tmp_path / "straight", model, *changes))
    run = small_run(tmp_path / "stopped", model, *changes)
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            experiment.execute(run)
    monkeypatch.setattr(initial_model, "attach_adapters", None)  # what was initialised is not initialised again
    return straight, finish(run)


def attach_llama(*overrides, base=None, cached=None, data=None):
    run = run_config(*overrides)
    init = run.init.completed(lambda: 1e-6, 100)
    probe = Probe(batches_of(data or examples(), 2, 0), "example")
    base = random_llama() if base is None else base
    return attach_adapters(base, adaptation_for(run), build_init(init), probe, seed=0, cached=cached)


def lora_tensors(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def start_of(init, layer, gradient=None):
    """Factors of a configured initialisation for one layer, from its gradient where it wants one."""
    method = build_init(init)
    if not init.needs_gradient:
        return method.factors(layer, None)
    if init.sets_ranks:
        return method.factors(layer, method.measure(layer, gradient))
    if init.needs_moments:
        m, n = layer.shape
        return method.factors(layer, Moments(gradient, torch.eye(n).double(), torch.ones(m).double(), 0.0))
    settings = StepSettings(singular=init.vectors * layer.rank, tolerance=init.tolerance, transform=method.transform)
    return method.factors(layer, factorised(layer.name, gradient, settings))


def composed(*overrides: str):
    """The configuration as Hydra composes it from these overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


def run_config(*overrides: str) -> RunConfig:
    """Checked; nothing of a test lands in the user's own cache."""
    return RunConfig.from_hydra(composed("wandb.mode=disabled", "dataset.cache=null", *overrides))


def adaptation_for(run: RunConfig, dtype: str | None = None) -> Adaptation:
    """What the run trains, with adapters of that dtype (None: the run's), outside a run's folder."""
    if dtype is not None:
        run = dataclasses.replace(run, init=dataclasses.replace(run.init, dtype=dtype))
    return adaptation_of(run, Path("no run"))


def finish(run: RunConfig) -> RunFolder:
    """Run it and give its folder."""
    return experiment.execute(run)


def logits_at_saving(monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"trained": logits} of the model that the next run has trained, taken right before it is saved."""
    found: dict[str, torch.Tensor] = {}
    original = experiment.save

    def remember(parts, model, tracker):
        with torch.no_grad():
            found["trained"] = model.eval()(ids).logits
        original(parts, model, tracker)

    monkeypatch.setattr(experiment, "save", remember)
    return found


def small_run(results: Path, model: Path | str = BUNDLED / "tiny", *overrides: str) -> RunConfig:
    """An experiment of some seconds: 48 problems, batches of 8, validation without generated answers."""
    return run_config(
        f"results_dir={results}",
        f"model.name={model}",
        "dataset.train_size=48",
        "dataset.validation_size=8",
        "dataset.accuracy_examples=0",
        "dataset.max_new_tokens=8",
        "model.real_batch_size=8",
        "model.per_device_batch_size=8",
        *overrides,
    )
