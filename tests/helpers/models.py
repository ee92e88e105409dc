"""Small models made on the spot, and layers that the gradient has to cope with."""

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_one.models import load_model, original_weights


class FactorLayer(nn.Module):
    """The factors of one layer where PEFT has them."""

    def __init__(self, B, A):
        super().__init__()
        (m, r), n = B.shape, A.shape[1]
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, r, bias=False, dtype=A.dtype)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, m, bias=False, dtype=A.dtype)})
        self.A.data, self.B.data = A.clone(), B.clone()

    @property
    def A(self):
        return self.lora_A["default"].weight

    @property
    def B(self):
        return self.lora_B["default"].weight


def wide_llama():
    """Layers of 48 to 160 rows and columns: more than the 28 columns of a sketch for rank 4."""
    return random_llama(hidden_size=96, intermediate_size=160)


def random_gpt2(**changes):
    torch.manual_seed(0)
    settings = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
    config = GPT2Config(bos_token_id=0, eos_token_id=1, **settings | changes)
    return GPT2LMHeadModel(config).requires_grad_(False).eval()


# mixtures of experts
def random_mixtral():
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=512, hidden_size=32, intermediate_size=48, initializer_range=0.1, **settings)
    return MixtralForCausalLM(config).requires_grad_(False).eval()


def random_deepseek(**changes):
    """A dense block, then one of four fused experts and a shared one."""
    torch.manual_seed(0)
    settings = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    ranks = {"v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    blocks = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "initializer_range": 0.1}
    config = DeepseekV3Config(**settings | heads | ranks | experts | blocks | changes)
    return DeepseekV3ForCausalLM(config).requires_grad_(False).eval()


def random_reader_of_images(vocabulary: int = 512):
    """A causal model with a vision tower, as AutoModelForCausalLM loads Gemma 3 from 4B."""
    torch.manual_seed(0)
    text = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.1}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text | heads | {"bos_token_id": 1, "eos_token_id": 2},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=vocabulary - 1,
    )
    return Gemma3ForConditionalGeneration(config).requires_grad_(False).eval()


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
    return quantized(lambda: random_llama(**changes), folder, kind)


def quantized(made, folder: Path, kind: str = "nf4"):
    """``quantized_llama`` of another model. made: returns it."""
    with warnings.catch_warnings():  # torch's own, of a dependency that bitsandbytes imports
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes: pip install -e .[quant]")
    if not (folder / "config.json").exists():
        made().save_pretrained(folder)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = load_model(str(folder), dtype="fp32", quantization=kind)
    return model, original_weights(model, str(folder))


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
