"""Offline, one torch thread, small models made on the spot."""

import dataclasses
import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries are imported
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
import torch

from lora_one.errors import RunError
from lora_one.evaluation import sandbox
from lora_one.models import load_tokenizer
from tests.helpers.models import random_llama
from tests.helpers.paths import shared

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background


def pytest_collection_finish():
    """Later garbage collections, three or more in each run, leave out the modules and the tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    """Of the bundled model: byte-level BPE, <s> in front."""
    return load_tokenizer("bundled/tiny")


@pytest.fixture(scope="session")
def sentencepiece_tokenizer():
    """Of a real Llama: byte-fallback BPE that puts a space in front of a text, no padding token."""
    return load_tokenizer(str(shared("models/stories260K-hf")))


@pytest.fixture
def llama():
    return random_llama()


@pytest.fixture
def attrs_package(monkeypatch):
    """PEFT's CorDA takes one decorator from the attrs package; where that is not installed, dataclasses' stands in."""
    if importlib.util.find_spec("attr") is None:
        stand_in = ModuleType("attr")
        stand_in.dataclass = dataclasses.dataclass
        stand_in.__spec__ = ModuleSpec("attr", None)
        monkeypatch.setitem(sys.modules, "attr", stand_in)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, tokenizer):
    """The random model on disk, with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "random-llama"
    random_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def isolated():
    """Programs can be isolated here, or a skip that says why not; where another tool can, it is no reason to skip."""
    try:
        sandbox.check_isolation(sandbox.Limits(seconds=30))
    except RunError as refusal:
        other = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--fork", "true"]
        if shutil.which("unshare") and subprocess.run(other, capture_output=True).returncode == 0:
            raise
        pytest.skip(str(refusal))


@pytest.fixture
def refusing_kernel(monkeypatch):
    """For the sandbox's launcher, unshare is not permitted."""
    refusal = """
import isolation
real = isolation.call
def call(name, *arguments):
    if name == "unshare":
        raise PermissionError(1, "unshare: Operation not permitted")
    real(name, *arguments)
isolation.call, isolation.drop_root = call, lambda: None
import launcher"""
    monkeypatch.setattr(sandbox, "START", sandbox.START.replace("import launcher", refusal))
