"""Training of the small model with plain LoRA."""

import torch

from lora_one.adaptation.wrapping import wrap
from lora_one.files import read_lines
from lora_one.initialization.methods import build_init
from lora_one.initialization.start import attach_adapters
from lora_one.records.tracking import Tracker
from lora_one.training.job import TrainingJob
from lora_one.training.loop import train
from tests.helpers.models import random_llama
from tests.helpers.runs import adaptation_for, run_config


def adapted(run):
    return attach_adapters(random_llama(), adaptation_for(run), build_init(run.init), None, seed=0)[0]


def settings(*overrides):
    return run_config(
        "init=default",
        "model.real_batch_size=6",
        "model.per_device_batch_size=3",
        "model.learning_rate=1e-2",
        "model.scheduler=constant",
        "model.warmup=0",
        *overrides,
    )


def trained(run, folder, data):
    model = adapted(run)
    tracker = Tracker(folder / "metrics.jsonl")
    train(
        model,
        data,
        TrainingJob(run, adaptation_for(run), checkpoints=folder / "checkpoints", pad_id=0, tracker=tracker),
    )
    factors = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return factors, [line["loss"] for line in read_lines(tracker.path)]


def adapted_llama(dtype=torch.float32, **changes):
    """A random model with random factors of both sides, as after some training."""
    run = run_config("init=default", "init.lora_B=zeros")
    model = wrap(random_llama(**changes).to(dtype), run.peft, "fp32")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model.eval()
