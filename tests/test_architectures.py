"""What trains beside or instead of adapters: every weight, embeddings, a share of the width as rank; seeds apart."""

import shutil

import pytest
import torch
from conftest import finish, folder_of, random_llama, random_roberta, run_config, small_run
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_one.adaptation import layers as adapters
from lora_one.adaptation.checkpoints import merge_adapter
from lora_one.adaptation.wrapping import trained_copies, wrap
from lora_one.errors import RunError, UsageError
from lora_one.models import check_positions, with_rank
from lora_one.runs.saving import merge_run

SHORT = ("dataset.accuracy_examples=0", "model.epochs=1", "model.max_length=64")


@pytest.fixture
def base(tokenizer, tmp_path):
    return folder_of(random_llama(len(tokenizer)), tokenizer, tmp_path / "base")


@pytest.mark.parametrize("bf16", [False, True])
def test_full_fine_tuning_moves_every_weight_and_leaves_a_plain_checkpoint(base, tmp_path, bf16, capsys):
    run = small_run(
        tmp_path, base, "peft=full_ft", f"model.bf16={bf16}", "model.learning_rate=1e-3", *SHORT, "model.epochs=3"
    )
    folder = finish(run)
    record = folder.read()
    assert not folder.adapter.exists() and "adapter" not in record["artifacts"]
    assert folder.path.parent.name.startswith("full-ft-lr0.001")
    tuned = AutoModelForCausalLM.from_pretrained(folder.merged)
    original = AutoModelForCausalLM.from_pretrained(base)
    assert tuned.dtype == (torch.bfloat16 if bf16 else torch.float32)
    for (name, one), other in zip(tuned.named_parameters(), original.parameters(), strict=True):
        assert not torch.equal(one, other.to(one.dtype)), name
    assert record["trainable_parameters"] == sum(parameter.numel() for parameter in original.parameters())
    assert record["train"]["last_loss"] < record["train"]["first_loss"]
    assert tuned.config.use_cache, "text is generated as fast as before"
    merge_run(folder)
    assert "nothing to merge: every weight was trained" in capsys.readouterr().out
    shutil.rmtree(folder.merged)
    with pytest.raises(RunError, match="is missing: overwrite=true"):
        merge_run(folder)


def test_full_fine_tuning_is_plain_adamw(base, tmp_path):
    """Two steps against torch alone: the same batches, the same clipping, the same schedule."""
    run = small_run(
        tmp_path, base, "peft=full_ft", "dataset.train_size=8", "model.epochs=2", "model.scheduler=constant",
        "model.warmup=0", "dataset.accuracy_examples=0", "model.max_length=64", "model.loss=token",
    )  # fmt: skip
    tuned = AutoModelForCausalLM.from_pretrained(finish(run).merged)

    from lora_one.data import load_dataset
    from lora_one.data.encode import batches_of, encoder_for

    encoder = encoder_for(run.model, run.dataset)
    (batch,) = batches_of(load_dataset(run.dataset, encoder, 64).train, 8, encoder.pad_id)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.model.learning_rate, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for (name, one), other in zip(tuned.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-5, msg=name)


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
def test_what_trains_whole_beside_16_bit_trains_in_fp32_and_is_merged_in_16(tied, tokenizer):
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


def test_a_relative_rank_is_a_share_of_the_width(base):
    run = with_rank(run_config(f"model.name={base}", "peft.lora_relative_r=0.1", "init.direction=LoRA-SB"))
    assert run.peft.lora_r == 3, "of a width of 32"
    assert run.peft.lora_alpha == 3, "LoRA-SB has s = 1 whatever the rank"
    assert with_rank(run_config(f"model.name={base}")).peft.lora_r == 8


def test_seeds_of_order_and_training_are_apart(base, tmp_path):
    """Without dropout the training seed leaves no trace, and the order's does; the init's seed is another one."""

    def adapter(*overrides):
        run = small_run(tmp_path, base, "init=default", "peft.lora_r=2", *SHORT, *overrides)
        return load_file(finish(run).adapter / "adapter_model.safetensors")

    def same(one, other):
        return all(torch.equal(one[name], other[name]) for name in one)

    plain = adapter()
    assert same(plain, adapter("model.seed=7")) and same(plain, adapter("model.seed=7", "model.order_seed=42"))
    assert not same(plain, adapter("model.order_seed=7"))
    assert not same(plain, adapter("init.seed=7"))
    assert not same(adapter("peft.lora_dropout=0.3"), adapter("peft.lora_dropout=0.3", "model.seed=7"))
    assert same(adapter("seed=7"), adapter("init.seed=7", "model.order_seed=7"))


def test_every_epoch_s_adapter_is_kept_and_the_last_is_the_run_s(base, tmp_path):
    options = ("peft.lora_r=2", "model.keep_epochs=true", "init.direction=LoRA-GA", *SHORT, "model.epochs=3")
    folder = finish(small_run(tmp_path, base, *options))
    kept = sorted(place.name for place in (folder.path / "epochs").iterdir())
    assert kept == ["1", "2", "3"]
    one, two, three, last = (
        load_file(place / "adapter_model.safetensors")
        for place in (*(folder.path / "epochs" / number for number in kept), folder.adapter)
    )
    assert all(torch.equal(three[name], last[name]) for name in last)
    assert any(not torch.equal(one[name], two[name]) for name in last)


def test_learnt_positions_bound_the_length(tokenizer):
    model = random_roberta(len(tokenizer))
    check_positions(model, run_config("model.max_length=64").model)
    with pytest.raises(UsageError, match=r"model\.max_length=65 exceeds the 64 positions"):
        check_positions(model, run_config("model.max_length=65").model)
    check_positions(random_llama(), run_config("model.max_length=4096").model)  # rotary ones are not learnt
