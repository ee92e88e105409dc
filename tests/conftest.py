"""Offline, one torch thread, small models made on the spot."""

import dataclasses
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_one.adaptation.protocol import Adaptation
from lora_one.config import RunConfig
from lora_one.errors import RunError
from lora_one.evaluation import sandbox
from lora_one.initialization.low_rank_step import StepSettings, factorised
from lora_one.initialization.methods import build_init
from lora_one.models import BUNDLED, load_model, load_tokenizer, original_weights
from lora_one.records.folder import RunFolder
from lora_one.runs import experiment
from lora_one.runs.parts import adaptation_of

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """Of the bundled model: byte-level BPE, <s> in front."""
    return load_tokenizer("bundled/tiny")


@pytest.fixture(scope="session")
def sentencepiece_tokenizer():
    """Of a real Llama: byte-fallback BPE that puts a space in front of a text, no padding token."""
    return load_tokenizer(str(shared("models/stories260K-hf")))


def shared(path: str) -> Path:
    """A file of the real data beside the project, or a skip."""
    if not (SHARED / path).exists():
        pytest.skip(f"real data not here: {SHARED / path}")
    return SHARED / path


def real_model(name: str) -> Path:
    """A real pretrained model that ../shared/models/fetch_real.sh makes, or a skip."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "real_models"
    folder = Path(os.environ.get("REAL_MODELS") or default) / name
    if not (folder / "config.json").exists():
        pytest.skip(f"real model not here: {folder}; ../shared/models/fetch_real.sh makes it")
    return folder


def random_llama(vocabulary: int = 512, seed: int = 0, **changes) -> LlamaForCausalLM:
    """Two layers of width 32 with weights large enough that gradients differ between layers."""
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.1,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).requires_grad_(False).eval()


def random_t5(vocabulary: int = 512, **changes) -> T5ForConditionalGeneration:
    """An encoder-decoder of two layers each, width 32."""
    torch.manual_seed(0)
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.1}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=vocabulary, **settings | ends | changes)).eval()


def random_roberta(vocabulary: int = 512, labels: int = 2) -> RobertaForSequenceClassification:
    """Two layers of width 32 and 64 positions, with a head."""
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    places = {"max_position_embeddings": 66, "pad_token_id": 1, "initializer_range": 0.1}
    return RobertaForSequenceClassification(
        RobertaConfig(vocab_size=vocabulary, num_labels=labels, **settings | places)
    ).eval()


def random_bert(vocabulary: int = 512, labels: int = 2) -> BertForSequenceClassification:
    """Two layers of width 32 and 64 positions, with a head, that tell the two texts of a pair apart by token types."""
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    places = {"max_position_embeddings": 64, "initializer_range": 0.1}
    return BertForSequenceClassification(
        BertConfig(vocab_size=vocabulary, num_labels=labels, **settings | places)
    ).eval()


def bert_tokenizer() -> BertTokenizer:
    """WordPiece with [CLS] and [SEP], and no end-of-sequence token, as BERT's."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sentence", "number", "good", "bad", *"0123456789"]
    words += [f"##{digit}" for digit in "0123456789"]
    return BertTokenizer(vocab={word: place for place, word in enumerate(words)})


def folder_of(model, tokenizer, place: Path) -> Path:
    """Model and tokenizer as a folder of the hub holds them."""
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def quantized_llama(folder: Path, kind: str = "nf4", **changes):
    """The random model as bitsandbytes quantises it on loading, and its weights as they were; skips without it."""
    with warnings.catch_warnings():  # torch's own, of a dependency that bitsandbytes imports
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes: pip install -e .[quant]")
    if not (folder / "config.json").exists():
        random_llama(**changes).save_pretrained(folder)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return load_model(str(folder), dtype="fp32", quantization=kind), original_weights(str(folder))


@pytest.fixture
def llama():
    return random_llama()


class Shared(nn.Module):
    """One linear layer used three times, one used once; its blocks checkpointed by torch as asked."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.shared = nn.Embedding(64, 16), nn.Linear(16, 16)
        self.once, self.head = nn.Linear(16, 16), nn.Linear(16, 64)
        self.reentrant = reentrant
        self.requires_grad_(False)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        def once(hidden):
            return hidden + torch.tanh(self.shared(hidden))

        def twice(hidden):
            return hidden + torch.tanh(self.shared(self.once(torch.tanh(self.shared(hidden)))))

        hidden = self.words(input_ids)
        for block in (once, twice):
            plain = self.reentrant is None
            hidden = block(hidden) if plain else checkpoint(block, hidden, use_reentrant=self.reentrant)
        return SimpleNamespace(logits=self.head(hidden))


class Experts(Shared):
    """Four experts as layers of their own, of which tokens reach those asked for."""

    def __init__(self, used=(0, 2)):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4)).requires_grad_(False)
        self.used = used

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.words(input_ids)
        return SimpleNamespace(logits=self.head(sum(torch.tanh(self.experts[index](hidden)) for index in self.used)))


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


def start_of(init, layer, gradient=None):
    """Factors of a configured initialisation for one layer, from its gradient where it wants one."""
    method = build_init(init)
    if not init.needs_gradient:
        return method.factors(layer, None)
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
    return adaptation_of(run, RunFolder(Path("no run")))


def finish(run: RunConfig) -> RunFolder:
    """Run it and give its folder."""
    return experiment.execute(run)


def logits_at_saving(monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"trained": logits} of the model that the next run has trained, taken right before it is saved."""
    found: dict[str, torch.Tensor] = {}
    original = experiment.save

    def remember(parts, model):
        with torch.no_grad():
            found["trained"] = model.eval()(ids).logits
        original(parts, model)

    monkeypatch.setattr(experiment, "save", remember)
    return found


def small_run(results: Path, model: Path | str = BUNDLED / "tiny", *overrides: str) -> RunConfig:
    """An experiment of some seconds: 48 problems, batches of 8, few generated tokens."""
    return run_config(
        f"results_dir={results}",
        f"model.name={model}",
        "dataset.train_size=48",
        "dataset.validation_size=8",
        "dataset.accuracy_examples=4",
        "dataset.max_new_tokens=8",
        "model.real_batch_size=8",
        "model.per_device_batch_size=8",
        *overrides,
    )
