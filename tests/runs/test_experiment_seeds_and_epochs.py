"""What trains beside or instead of adapters: every weight, embeddings, a share of the width as rank; seeds apart."""

import torch
from safetensors.torch import load_file

from tests.helpers.runs import SHORT, finish, small_run


def test_seeds_of_order_and_training_are_apart(llama_folder, tmp_path):
    """Without dropout the training seed has no effect and the order's seed has; the init has a separate seed."""

    def adapter(*overrides):
        run = small_run(tmp_path, llama_folder, "init=default", "peft.lora_r=2", *SHORT, *overrides)
        return load_file(finish(run).adapter / "adapter_model.safetensors")

    def same(one, other):
        return all(torch.equal(one[name], other[name]) for name in one)

    plain = adapter()
    assert same(plain, adapter("model.seed=7")) and same(plain, adapter("model.seed=7", "model.order_seed=42"))
    assert not same(plain, adapter("model.order_seed=7"))
    assert not same(plain, adapter("init.seed=7"))
    assert not same(adapter("peft.lora_dropout=0.3"), adapter("peft.lora_dropout=0.3", "model.seed=7"))
    assert same(adapter("seed=7"), adapter("init.seed=7", "model.order_seed=7"))


def test_every_epoch_s_adapter_is_kept_and_the_last_is_the_run_s(llama_folder, tmp_path):
    options = ("peft.lora_r=2", "model.keep_epochs=true", "init.direction=LoRA-GA", *SHORT, "model.epochs=3")
    folder = finish(small_run(tmp_path, llama_folder, *options))
    kept = sorted(place.name for place in (folder.path / "epochs").iterdir())
    assert kept == ["1", "2", "3"]
    one, two, three, last = (
        load_file(place / "adapter_model.safetensors")
        for place in (*(folder.path / "epochs" / number for number in kept), folder.adapter)
    )
    assert all(torch.equal(three[name], last[name]) for name in last)
    assert any(not torch.equal(one[name], two[name]) for name in last)
