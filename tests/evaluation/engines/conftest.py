"""A completion server of the bundled model, and no waiting between attempts."""

import pytest

from lora_one.evaluation.engines import connection
from lora_one.models import load_model
from tests.helpers.completion_server import completion_servers


@pytest.fixture(scope="module")
def model():
    return load_model("bundled/tiny", dtype="fp32")


@pytest.fixture
def serve(model, tokenizer):
    with completion_servers(model, tokenizer) as started:
        yield started


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(connection, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(connection, "LONGEST_WAIT", 0.05)
    monkeypatch.delenv(connection.KEY, raising=False)
