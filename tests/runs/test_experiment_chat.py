"""A run on conversations, and one with a loss on the prompt: start, training and validation all see the same."""

import json

import pytest

from lora_one.files import read_lines
from lora_one.models import load_tokenizer
from tests.helpers.chat import CHATML, chat_model, row_of, with_template
from tests.helpers.datasets import write_jsonl
from tests.helpers.models import folder_of, random_llama
from tests.helpers.runs import finish, run_config, small_run


def conversations(place):
    """30 conversations of one to three questions."""
    rows = []
    for i in range(30):
        turns = [[("user", f"What is {i} + {j}?"), ("assistant", f"It is {i + j}.")] for j in range(1 + i % 3)]
        rows.append(row_of(*(turn for pair in turns for turn in pair)))
    return write_jsonl(place / "chat.jsonl", rows)


@pytest.fixture
def chat(tmp_path):
    """Overrides of a run on the conversations."""
    common = ("dataset=chat", "model=tiny", f"model.name={chat_model(tmp_path / 'model')}", "init=lora_one")
    sizes = ("model.real_batch_size=8", "model.per_device_batch_size=4", "model.max_length=256")
    return [*common, *sizes, f"dataset.path={conversations(tmp_path)}", "model.learning_rate=1e-2"]


def losses(folder):
    return [line["loss"] for line in read_lines(folder.metrics) if "loss" in line]


def test_a_run_on_conversations(chat, tmp_path):
    record = finish(run_config(*chat, f"results_dir={tmp_path / 'results'}")).read()
    assert record["data"]["train"] == {"whole": 27, "shortened": 0, "dropped": 0}
    assert record["init"]["method"] == "LoRA-One" and record["init"]["loss_after"] < record["init"]["loss_before"]
    assert (
        record["evaluation"]["final"]["eval_loss"] > 0 and record["train"]["last_loss"] < record["train"]["first_loss"]
    )


@pytest.mark.parametrize("more", [["model.saving=true"], ["peft=full_ft"]])
def test_the_saved_model_ends_with_the_turn(tmp_path, more):
    """In plain transformers: the answers that were learnt end with the template's token, not with EOS."""
    tokenizer = with_template(load_tokenizer("bundled/tiny"), CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    model = folder_of(random_llama(len(tokenizer)), tokenizer, tmp_path / "model")
    sizes = ("model.real_batch_size=8", "model.per_device_batch_size=4", "model.max_length=256", "model.epochs=0.3")
    data = ("dataset=chat", f"dataset.path={conversations(tmp_path)}", f"results_dir={tmp_path / 'results'}")
    folder = finish(run_config("model=tiny", f"model.name={model}", "init=lora", *data, *sizes, *more))
    ends = json.loads((folder.merged / "generation_config.json").read_text())["eos_token_id"]
    before = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [before, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_packing_and_micro_batches_change_no_loss(chat, tmp_path):
    alone = finish(run_config(*chat, f"results_dir={tmp_path / 'alone'}", "model.per_device_batch_size=1"))
    packed = finish(run_config(*chat, f"results_dir={tmp_path / 'packed'}", "model.packing=true"))
    assert losses(packed) == pytest.approx(losses(alone), rel=1e-3)


def test_a_loss_on_the_prompt_is_another_run_with_other_losses(tmp_path):
    common = (tmp_path / "results", "bundled/tiny", "init=lora_one")
    answers, everything = finish(small_run(*common)), finish(small_run(*common, "dataset.train_on_inputs=true"))
    assert answers.path != everything.path
    found = [json.loads(folder.run_json.read_text()) for folder in (answers, everything)]
    assert [record["config"]["dataset"]["train_on_inputs"] for record in found] == [False, True]
    assert found[0]["init"]["loss_before"] < found[1]["init"]["loss_before"]
    assert found[0]["evaluation"]["final"]["eval_loss"] < found[1]["evaluation"]["final"]["eval_loss"]
