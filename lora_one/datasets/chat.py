"""Your own conversations: a column of a local file with the turns of each conversation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_one.datasets.own import LocalConfig
from lora_one.datasets.sources import checked_text, each_row
from lora_one.errors import UsageError
from lora_one.types import Example

SHAREGPT = "conversations"  # the column in ShareGPT's format, whose turns are {"from": "human", "value": ...}
ROLES = {"human": "user", "gpt": "assistant"}
KNOWN = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class ConversationConfig(LocalConfig):
    messages: str  # name of the column

    def check(self) -> None:
        """Check the settings. Raises UsageError: no local file, or conversations without the chat template."""
        super().check()
        if not self.chat_template:
            raise UsageError(
                f"dataset={self.name} is encoded by the tokenizer's chat template, which "
                "dataset.chat_template=False turns off: leave that key out"
            )


def conversations(config: ConversationConfig) -> Iterator[Example]:
    """Yield one example for each row; the encoding drops and counts those without an assistant's turn.

    Raises UsageError: a row is not a conversation of texts (the row is named).
    """
    column = config.messages
    rows = each_row(None, config.path, "train", [], nested=[column], other_names={column: SHAREGPT})
    for number, row in enumerate(rows, start=1):
        yield example_of(row[column], f"{config.path}, row {number}")


def example_of(messages: Any, where: str) -> Example:
    """Return the example of one conversation: the last assistant's turn is its response, all others are its prompt."""
    if not isinstance(messages, list) or not messages:
        raise UsageError(
            f"{where}: a conversation must be a list of at least one message, got {messages!r:.60}: correct the row, "
            "or name another column (dataset.messages=<column>)"
        )
    turns = tuple(turn_of(message, where) for message in messages)
    texts = [text for _, text in turns]
    answers = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
    response = texts.pop(answers[-1]) if answers else ""
    return Example("\n".join(texts), response, messages=turns)


def turn_of(message: Any, where: str) -> tuple[str, str]:
    """Return (role, text) of a message. Raises UsageError: an unknown role, or a content that is not a text.

    Other keys, such as name, are not read.
    """
    given = message if isinstance(message, dict) else {}
    role, text = given.get("role", given.get("from")), given.get("content", given.get("value"))
    role = ROLES.get(role, role)
    if not isinstance(text, str) or given.get("tool_calls"):
        raise UsageError(
            f'{where}: a message must be {{"role": ..., "content": <text>}} or {{"from": ..., "value": <text>}} '
            f"without tool calls, got {message!r:.80}: correct or remove the row"
        )
    if given.get("weight") == 0 and role == "assistant":
        raise UsageError(
            f"{where}: an assistant's message has weight 0, but every turn of the assistant is learnt: remove the key, "
            "or split the conversation"
        )
    if role not in KNOWN:
        raise UsageError(
            f"{where}: the role {role!r} is not one of {', '.join((*KNOWN, *ROLES))}: rename the role in the file"
        )
    return role, checked_text(text, where)
