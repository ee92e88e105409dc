"""What trains beside or instead of adapters: every weight, embeddings, a share of the width as rank; seeds apart."""

import pytest

from lora_one.errors import UsageError
from lora_one.models import check_positions, with_rank
from tests.helpers.models import random_llama, random_roberta
from tests.helpers.runs import run_config


def test_a_relative_rank_is_a_share_of_the_width(llama_folder):
    run = with_rank(run_config(f"model.name={llama_folder}", "peft.lora_relative_r=0.1", "init.direction=LoRA-SB"))
    assert run.peft.lora_r == 3, "of a width of 32"
    assert run.peft.lora_alpha == 3, "LoRA-SB has s = 1 whatever the rank"
    assert with_rank(run_config(f"model.name={llama_folder}")).peft.lora_r == 8


def test_learnt_positions_bound_the_length(tokenizer):
    model = random_roberta(len(tokenizer))
    check_positions(model, run_config("model.max_length=64").model)
    with pytest.raises(
        UsageError, match=r"model\.max_length=65 is more than the 64 position embeddings .* model\.max_length=64"
    ):
        check_positions(model, run_config("model.max_length=65").model)
    check_positions(random_llama(), run_config("model.max_length=4096").model)  # rotary ones are not learnt
