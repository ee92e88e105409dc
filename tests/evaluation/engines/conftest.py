"""A completion server of the bundled model, and no waiting between attempts."""

import pytest

from lora_one.evaluation.engines import connection
from lora_one.models import load_model
from tests.helpers.completion_server import CompletionServer
from tests.helpers.models import random_llama


@pytest.fixture(scope="module")
def model():
    return load_model("bundled/tiny", dtype="fp32")


@pytest.fixture
def serve(model, tokenizer):
    """A function that starts a server with this plan and other options; at the end all are stopped."""
    servers = []

    def started(plan=None, **options):
        other = random_llama(model.config.vocab_size)
        servers.append(CompletionServer(model, tokenizer, plan, other=other, slow=0.05, **options).start())
        return servers[-1]

    yield started
    for server in servers:
        server.stop()


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(connection, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(connection, "LONGEST_WAIT", 0.05)
    monkeypatch.delenv(connection.KEY, raising=False)
