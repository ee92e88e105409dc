"""Rows with conversations: both formats, and what is not one is refused with its row."""

import pytest

from lora_one.datasets.chat import conversations
from lora_one.errors import UsageError
from tests.helpers.chat import TURNS, row_of
from tests.helpers.datasets import dataset_for, write_jsonl


def config_for(tmp_path, *rows):
    return dataset_for("dataset=chat", f"dataset.path={write_jsonl(tmp_path / 'rows.jsonl', rows)}")


def test_the_last_reply_is_the_response_and_all_else_the_prompt(tmp_path):
    (example,) = conversations(config_for(tmp_path, row_of()))
    assert example.messages == TURNS
    assert example.response == TURNS[3][1]
    assert example.prompt == "\n".join(text for place, (_, text) in enumerate(TURNS) if place != 3)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "hello"}, "must be a list of at least one message"),
        ({"messages": []}, "must be a list of at least one message"),
        ({"messages": ["hello"]}, 'must be {"role"'),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 'must be {"role"'),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "without tool calls"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "weight 0, but every turn"),
        ({"messages": [{"role": "user", "content": "x\ud83d"}]}, "half of a character"),
        ({"messages": [{"role": "model", "content": "x"}]}, "the role 'model' is not one of system"),
    ],
)
def test_what_is_not_a_conversation_is_refused_with_its_row(tmp_path, row, words):
    with pytest.raises(UsageError) as refused:
        list(conversations(config_for(tmp_path, row_of(), row)))
    assert "row 2" in str(refused.value) and words in str(refused.value)
