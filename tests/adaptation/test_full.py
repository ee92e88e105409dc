"""What trains beside or instead of adapters: every weight, embeddings, a share of the width as rank; seeds apart."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_one.errors import RunError
from lora_one.runs.saving import merge_run
from tests.helpers.runs import SHORT, finish, small_run


@pytest.mark.parametrize("bf16", [False, True])
def test_full_fine_tuning_moves_every_weight_and_leaves_a_plain_checkpoint(llama_folder, tmp_path, bf16, capsys):
    run = small_run(
        tmp_path,
        llama_folder,
        "peft=full_ft",
        f"model.bf16={bf16}",
        "model.learning_rate=1e-3",
        *SHORT,
        "model.epochs=3",
    )
    folder = finish(run)
    record = folder.read()
    assert not folder.adapter.exists() and "adapter" not in record["artifacts"]
    assert folder.path.parent.name.startswith("full-ft-lr0.001")
    tuned = AutoModelForCausalLM.from_pretrained(folder.merged)
    original = AutoModelForCausalLM.from_pretrained(llama_folder)
    assert tuned.dtype == (torch.bfloat16 if bf16 else torch.float32)
    for (name, one), other in zip(tuned.named_parameters(), original.parameters(), strict=True):
        assert not torch.equal(one, other.to(one.dtype)), name
    assert record["trainable_parameters"] == sum(parameter.numel() for parameter in original.parameters())
    assert record["train"]["last_loss"] < record["train"]["first_loss"]
    assert tuned.config.use_cache, "text is generated as fast as before"
    merge_run(folder)
    assert "nothing to merge: this run trained every weight" in capsys.readouterr().out
    shutil.rmtree(folder.merged)
    with pytest.raises(RunError, match=r"is missing: .*overwrite=true"):
        merge_run(folder)


def test_full_fine_tuning_is_plain_adamw(llama_folder, tmp_path):
    """Two steps against torch alone: the same batches, the same clipping, the same schedule."""
    run = small_run(
        tmp_path, llama_folder, "peft=full_ft", "dataset.train_size=8", "model.epochs=2", "model.scheduler=constant",
        "model.warmup=0", "model.max_length=64", "model.loss=token",
    )  # fmt: skip
    tuned = AutoModelForCausalLM.from_pretrained(finish(run).merged)

    from lora_one.data import load_dataset
    from lora_one.data.encode import batches_of
    from lora_one.data.encoders import encoder_for

    encoder = encoder_for(run.model, run.dataset)
    (batch,) = batches_of(load_dataset(run.dataset, encoder, 64).train, 8, encoder.pad_id)
    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.model.learning_rate, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for (name, one), other in zip(tuned.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-5, msg=name)
