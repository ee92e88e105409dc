"""The loop against a hand-written one: same batches, same loss, same weights."""

import dataclasses

import pytest

from lora_one.config import rules
from lora_one.errors import UsageError
from lora_one.training.packing import check_packing
from tests.helpers.examples import examples
from tests.helpers.training import settings


def test_packing_is_refused_where_attention_would_cross(llama, monkeypatch):
    """A model that takes no notice of positions sees one long example."""
    check_packing(llama, examples(3))
    original = llama.forward
    monkeypatch.setattr(llama, "forward", lambda position_ids, **inputs: original(**inputs))
    with pytest.raises(UsageError, match=r"model.packing=true is not supported by this model.* drop model.packing"):
        check_packing(llama, examples(3))


def test_packing_is_for_causal_models():
    run = settings("model.packing=true")
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, type="ConditionalGeneration"))
    with pytest.raises(UsageError, match=r"model.packing=True .*ConditionalGeneration: set model.packing=false"):
        rules.check_batches(other)
