"""What trains beside or instead of adapters: every weight, embeddings, a share of the width as rank; seeds apart."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_one.adaptation import layers as adapters
from lora_one.adaptation.merging import merge_adapter
from lora_one.adaptation.wrapping import trained_copies, wrap
from tests.helpers.models import folder_of, random_llama
from tests.helpers.runs import SHORT, finish, run_config, small_run


@pytest.mark.parametrize("tied", [False, True])
def test_trained_embeddings_are_saved_with_the_adapter_and_merged(tied, tokenizer, tmp_path):
    base = folder_of(random_llama(len(tokenizer), tie_word_embeddings=tied), tokenizer, tmp_path / "base")
    folder = finish(small_run(tmp_path, base, "peft=all_w_emb", "peft.lora_r=2", "model.saving=true", *SHORT))
    assert "-emb-" in folder.path.parent.name
    load = AutoModelForCausalLM.from_pretrained
    merged, original = load(folder.merged).eval(), load(base).eval()
    words = (merged.get_input_embeddings().weight, original.get_input_embeddings().weight)
    outputs = (merged.get_output_embeddings().weight, original.get_output_embeddings().weight)
    assert not torch.equal(*words) and not torch.equal(*outputs)
    assert torch.equal(words[0], outputs[0]) == tied, "tied weights stay tied, others apart"
    adapted = PeftModel.from_pretrained(original, str(folder.adapter)).eval()
    ids = torch.tensor([[5, 9, 7, 33]])
    with torch.no_grad():
        one, other = (model(input_ids=ids).logits for model in (merged, adapted))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("tied", [False, True])
def test_whole_modules_on_a_16_bit_base_train_in_fp32_and_merge_in_16_bit(tied, tokenizer):
    model = random_llama(len(tokenizer), tie_word_embeddings=tied).bfloat16()
    peft = run_config("peft=all_w_emb", "peft.lora_r=2").peft
    ids = torch.tensor([[5, 9, 7, 33]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        wrapped = wrap(model, peft, "fp32")
        for layer in adapters.lora_layers(wrapped).values():
            layer.lora_B["default"].weight.zero_()
        assert torch.equal(wrapped(input_ids=ids).logits, before), "copies give what the originals gave"
        copies = list(trained_copies(wrapped))
        assert len(copies) == 2 and all(copy.weight.dtype == torch.float32 for copy in copies)
        assert all(copy.weight.requires_grad for copy in copies)
        merged = merge_adapter(wrapped)
        assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
        assert torch.equal(merged(input_ids=ids).logits, before)
