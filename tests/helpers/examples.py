"""Examples of random tokens, and the gradients that autograd finds on them."""

import torch
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from lora_one.data.encode import Encoded
from lora_one.initialization.gradients import mean_gradients
from lora_one.losses import loss_count, loss_sum, model_logits, targets


def linear_layers(model):
    return {
        name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }


def examples(count=5, vocabulary=512, seed=3):
    """Examples of different lengths and different numbers of answer tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        ids = torch.randint(2, vocabulary, (9 + 3 * index,), generator=generator).tolist()
        prompt = 3 + index % 3
        made.append(Encoded(ids, [-100] * prompt + ids[prompt:]))
    return made


def answer_tokens(example):
    return sum(label != -100 for label in example.labels)


def autograd_gradients(model, data, reduction):
    """Ask every weight for its gradient, one example at a time, with the model's own shift done by hand."""
    layers = linear_layers(model)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
        layer.weight.grad = None
    tokens = sum(answer_tokens(example) for example in data)
    for example in data:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1]
        losses = cross_entropy(logits, torch.tensor(example.labels[1:]), reduction="none", ignore_index=-100)
        (losses.sum() / (answer_tokens(example) * len(data) if reduction == "example" else tokens)).backward()
    gradients = {name: layer.weight.grad for name, layer in layers.items()}
    for layer in layers.values():
        layer.weight.requires_grad_(False)
    return gradients


RANK = 4
HOLDS = ["device", "cpu", "layer"]


def autograd(model, layers, batches, reduction="example"):
    """G (m, n) of each layer, by asking every weight for its gradient."""
    start = model.get_input_embeddings().weight
    for weight in [start, *(layer.weight for layer in layers.values())]:
        weight.requires_grad_(True)
        weight.grad = None
    count = sum(loss_count(targets(batch), reduction) for batch in batches)
    for batch in batches:
        (loss_sum(model_logits(model, batch), targets(batch), reduction) / count).backward()
    found = {n: layer.weight.grad.T if isinstance(layer, Conv1D) else layer.weight.grad for n, layer in layers.items()}
    for weight in [start, *(layer.weight for layer in layers.values())]:
        weight.requires_grad_(False)
        weight.grad = None
    return found


def gradients(model, layers, batches, hold, checkpointing=False):
    found = {}

    def consume(name, G):
        assert name not in found
        found[name] = G

    mean_gradients(model, layers, batches, "example", consume, place=hold, checkpointing=checkpointing)
    return found


def assert_same(found, expected, bound=1e-5):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = (value - expected[name]).norm() / expected[name].norm()
        assert error <= bound, (name, float(error))
