"""Conversations: every token is that of the chat template, and only the assistant's turns have a loss."""

import dataclasses

import pytest

from lora_one.data import load_dataset
from lora_one.data.conversations import ConversationEncoder, tokens_of
from lora_one.data.encode import pack
from lora_one.data.encoders import encoder_for
from lora_one.errors import RunError, UsageError
from lora_one.models import load_tokenizer
from tests.helpers.chat import (
    CHATML,
    FORGETFUL,
    GEMMA,
    MARKED_CHATML,
    TURNS,
    chat_model,
    conversation,
    row_of,
    with_template,
)
from tests.helpers.datasets import write_jsonl
from tests.helpers.paths import real_model
from tests.helpers.runs import run_config


@pytest.fixture(scope="module", params=["bundled", "gemma"])
def any_tokenizer(request):
    return load_tokenizer("bundled/tiny" if request.param == "bundled" else str(real_model("gemma-3-270m-hf")))


def learnt(tokenizer, encoded):
    """The texts of the runs of tokens that have a loss."""
    parts, before = [], False
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (-100, token)
        if label != -100:
            parts = [*parts[:-1], [*parts[-1], token]] if before else [*parts, [token]]
        before = label != -100
    return [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML, GEMMA], ids=["chatml", "marked", "gemma"])
def test_tokens_are_the_template_s_and_the_assistant_s_turns_have_a_loss(template, any_tokenizer):
    tokenizer = with_template(any_tokenizer, template)
    ((row, cut),) = ConversationEncoder(tokenizer).rows([conversation()], 512)
    messages = row_of()["messages"]
    assert row.input_ids == tokenizer.apply_chat_template(messages)["input_ids"] and not cut
    first, second = learnt(tokenizer, row)
    end = "<end_of_turn>" if template == GEMMA else "<|im_end|>"
    assert first == f"It is 5.{end}\n"
    assert second.lstrip("\n") == f"Twice 5 is 10.{end}\n"


def test_both_ways_to_find_the_turns_agree(any_tokenizer):
    """Also where the first characters of a turn become one token with the end of its header."""
    for turns in (TURNS, TURNS[:2], TURNS[1:4], (("system", "Be brief."), *TURNS)):
        messages = row_of(*turns)["messages"]
        by_turns = tokens_of(with_template(any_tokenizer, CHATML), messages)
        marked = tokens_of(with_template(any_tokenizer, MARKED_CHATML), messages)
        assert marked[0] == by_turns[0]
        if turns[0][0] != "assistant":  # without marks, the header of a first turn cannot be told from its text
            assert marked[1] == by_turns[1]


def test_the_prompt_of_generation_is_the_prefix(any_tokenizer):
    tokenizer = with_template(any_tokenizer, GEMMA)
    (ids,) = ConversationEncoder(tokenizer).prompts([conversation()])
    asked = row_of(TURNS[0])["messages"]
    assert ids == tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]


def test_what_no_loss_is_left_in_is_dropped_and_counted(tokenizer):
    encoder = ConversationEncoder(with_template(tokenizer, CHATML))
    (size,) = map(len, encoder.prompts([conversation()]))
    examples = [conversation(), conversation(TURNS[0])]  # the second one has no assistant's turn
    kept, counts = encoder.encode(examples, size + 2)
    assert (counts.whole, counts.shortened, counts.dropped) == (0, 1, 1)
    assert sum(label != -100 for label in kept[0].labels) == 2
    assert encoder.encode(examples, size)[0] == []
    assert f"shortest prompt: {min(map(len, encoder.prompts(examples)))} tokens" in str(
        encoder.nothing_left(examples, 1)
    )


def test_a_loss_on_everything_and_packing(tokenizer):
    encoder = ConversationEncoder(with_template(tokenizer, CHATML))
    (row,), _ = encoder.encode([conversation()], 512)
    (whole,), _ = dataclasses.replace(encoder, train_on_inputs=True).encode([conversation()], 512)
    assert whole.input_ids == whole.labels == row.input_ids
    assert pack([row, row])["labels"][0].tolist() == row.labels * 2


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    encoder = ConversationEncoder(with_template(tokenizer, FORGETFUL))
    thinking = (("user", "2 + 3?"), ("assistant", "hm</think>5"), ("user", "sure?"), ("assistant", "hm</think>yes"))
    assert encoder.encode([conversation(*thinking[:2])], 512)[1].whole == 1
    with pytest.raises(UsageError, match=r"differently when further turns follow.*\{% generation %\}.*'2 \+ 3\?'"):
        encoder.encode([conversation(*thinking)], 512)


def test_what_the_template_refuses_is_said_with_the_conversation(tokenizer):
    encoder = ConversationEncoder(with_template(tokenizer, GEMMA))
    with pytest.raises(UsageError, match=r"roles must alternate.*change or remove it.*roles user, user.*'What is 2"):
        encoder.encode([conversation(TURNS[0], TURNS[0])], 512)


def test_a_run_s_data(tmp_path):
    """From the file to both splits: either format, length filter, decontamination."""
    rows = [row_of(("user", f"What is {i}?"), ("assistant", f"It is {i}.")) for i in range(10)]
    rows += [row_of(("user", "long " * 100), ("assistant", "no")), row_of(("user", " ".join("abcdefghijklmn")))]
    (tmp_path / "questions.jsonl").write_text('{"question": "a b c d e f g h i j k l m n"}\n')
    changes = ("dataset.max_tokens=128", f"dataset.decontaminate={tmp_path / 'questions.jsonl'}")
    model = f"model.name={chat_model(tmp_path / 'model')}"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = run_config("dataset=chat", "model=tiny", model, f"dataset.path={path}", *changes)
    encoder = encoder_for(run.model, run.dataset)
    splits = load_dataset(run.dataset, encoder, 256)
    assert (len(splits.train), len(splits.validation)) == (9, 1)
    assert splits.counts["too_long"] == 1 and list(splits.counts["contaminated"].values()) == [1]
    assert learnt(encoder.tokenizer, splits.validation[0]) == ["It is 9.<|im_end|>\n"]
    names = {"user": "human", "assistant": "gpt"}
    other = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]} for row in rows
    ]
    write_jsonl(path, other)
    assert load_dataset(run.dataset, encoder, 256).train == splits.train


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [row_of()])
    run = run_config("dataset=chat", "model=tiny", f"dataset.path={path}")
    with pytest.raises(UsageError, match="no chat template, which conversations need: choose a chat model"):
        encoder_for(run.model, run.dataset)


def test_no_assistant_anywhere_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [row_of(TURNS[0])] * 3)
    model = f"model.name={chat_model(tmp_path / 'model')}"
    run = run_config("dataset=chat", "model=tiny", model, f"dataset.path={path}")
    with pytest.raises(RunError, match="none of the 3 examples has a response token"):
        load_dataset(run.dataset, encoder_for(run.model, run.dataset), 128)
