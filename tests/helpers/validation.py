"""Validation without a run, and how often a model is called."""

from types import SimpleNamespace

import torch

from lora_one.data import Splits
from lora_one.data.encode import Encoded
from lora_one.evaluation.validation import Validation
from tests.helpers.examples import examples
from tests.helpers.runs import run_config

ENCODER = SimpleNamespace(pad_id=1, tokenizer=None, prompts=lambda examples: [], stop=())


def validation_of(data, *changes):
    if isinstance(data[0].labels, int):
        changes += ("model.type=SequenceClassification", "dataset=mrpc")
    return Validation(run_config("init=default", *changes), Splits([], data, [], [], {}), ENCODER)


def heads(count):
    return [Encoded(example.input_ids, index % 2) for index, example in enumerate(examples(count))]


def apart(count):
    return [Encoded(e.input_ids, e.input_ids[:4], [0, *e.input_ids[:3]]) for e in examples(count)]


def counting(model, most=1 << 30):
    """The shapes of the inputs that the model is called with; more than ``most`` tokens do not fit in its memory."""
    shapes, original = [], model.forward

    def forward(input_ids, **rest):
        shapes.append(tuple(input_ids.shape))
        if input_ids.numel() > most:
            raise torch.OutOfMemoryError("no memory")
        return original(input_ids=input_ids, **rest)

    model.forward = forward
    return shapes
