"""The kind of a saved model."""

import pytest
from transformers import AutoConfig, BertConfig, GPT2Config, LlamaConfig, RobertaConfig, T5Config

from lora_one.errors import UsageError
from lora_one.model_kinds import CAUSAL, CLASSIFIER, ENCODER_DECODER
from lora_one.models import kind_of_checkpoint


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LlamaConfig(architectures=["LlamaForCausalLM"]), CAUSAL),
        (GPT2Config(architectures=["GPT2LMHeadModel"]), CAUSAL),
        (LlamaConfig(), CAUSAL),
        (T5Config(architectures=["T5ForConditionalGeneration"]), ENCODER_DECODER),
        (BertConfig(architectures=["BertForSequenceClassification"]), CLASSIFIER),
        (BertConfig(architectures=["BertLMHeadModel"], is_decoder=True), CAUSAL),
        (RobertaConfig(architectures=["RobertaForCausalLM"]), CAUSAL),
    ],
    ids=lambda value: f"{value.model_type} {value.architectures}" if hasattr(value, "model_type") else "",
)
def test_kind_of_a_checkpoint(config, kind, tmp_path):
    config.save_pretrained(tmp_path)
    assert kind_of_checkpoint(str(tmp_path)) is kind


@pytest.mark.parametrize("classes", [["BertModel"], ["BertForMaskedLM"], None])
def test_an_encoder_without_a_head_is_no_causal_model(classes, tmp_path):
    BertConfig(architectures=classes).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "bert"
    with pytest.raises(UsageError, match=rf"is an encoder without .* says: {(classes or ['bert'])[0]}\).*with a head"):
        kind_of_checkpoint(str(tmp_path))
