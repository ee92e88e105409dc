"""The encoding of conversations by the tokenizer's chat template; only the assistant's turns have a loss."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from lora_one.data.chat_template import templated
from lora_one.data.encode import Encoder, common_beginning, embedded
from lora_one.errors import UsageError
from lora_one.types import Example

ASSISTANT = "assistant"
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Messages = list[dict[str, str]]
Marked = tuple[list[int], list[bool]]  # token ids, and which of them the assistant writes


@dataclass(frozen=True)
class ConversationEncoder(Encoder):
    """Encodes conversations for a causal model: the tokens of the chat template, without a further EOS."""

    @classmethod
    def build(cls, tokenizer: Any, config: Any, vocabulary: int | None, *, chat: bool) -> Self:
        """Return the encoder for a model. Raises UsageError: the tokenizer has no chat template."""
        if tokenizer.chat_template is None:
            raise UsageError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template, which conversations need: choose a "
                "chat model, or save a template with the tokenizer (tokenizer.chat_template = ..., then "
                "tokenizer.save_pretrained(<model folder>))"
            )
        return cls(tokenizer, chat, vocabulary)

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the token ids before the assistant's first turn."""
        return [ids[: answered.index(True) if any(answered) else None] for ids, answered in self.marked(examples)]

    def marked(self, examples: Sequence[Example]) -> Iterator[Marked]:
        """Yield the tokens of each conversation, and which of them the assistant writes."""
        for example in examples:
            messages = [{"role": role, "content": content} for role, content in example.messages]
            ids, answered = tokens_of(self.tokenizer, messages)
            embedded([ids], self.vocabulary)
            yield ids, answered

    def sizes(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of each conversation."""
        return [len(ids) for ids, _ in self.marked(examples)]


def tokens_of(tokenizer: Any, messages: Messages) -> Marked:
    """Return the tokens of a conversation, and which of them the assistant writes.

    A template with ``{% generation %}`` says it itself. Otherwise an assistant's turn is what the template adds to the
    earlier turns and the start of the turn (``add_generation_prompt``), up to the next turn.
    Raises UsageError: the template refuses the conversation, or changes earlier turns when later ones follow.
    """
    if tokenizer.is_fast and MARK.search(tokenizer.get_chat_template()):
        found = apply(tokenizer, messages, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False})
        return found["input_ids"], list(map(bool, found["assistant_masks"]))
    return marked_by_turns(tokenizer, messages)


def marked_by_turns(tokenizer: Any, messages: Messages) -> Marked:
    """Return the same as ``tokens_of`` for a template without ``{% generation %}``.

    Each beginning of the conversation, before and after an assistant's turn, is rendered and tokenized by itself. A
    token that spans the start of a turn belongs to that turn.
    """
    whole = apply(tokenizer, messages, tokenize=False)
    ids = ids_of(tokenizer, whole)
    answered = [False] * len(ids)
    for place, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = apply(tokenizer, messages[:place], tokenize=False, add_generation_prompt=True) if place else ""
        after = apply(tokenizer, messages[: place + 1], tokenize=False)
        if not (whole.startswith(before) and whole.startswith(after)):
            raise UsageError(
                "the tokenizer's chat template writes the turns of a conversation differently when further turns "
                "follow, so the tokens of the assistant's turns cannot be found: put {% generation %} and "
                "{% endgeneration %} around them in the template, or use conversations with one assistant's turn "
                f"({described(messages)})"
            )
        begin, end = (len(common_beginning([ids, ids_of(tokenizer, text)])) for text in (before, after))
        answered[begin:end] = [True] * (end - begin)
    return ids, answered


def apply(tokenizer: Any, messages: Messages, **options: Any) -> Any:
    """Apply the chat template. Raises UsageError: it refuses the conversation."""
    try:
        return templated(tokenizer, messages, **options)
    except UsageError as error:
        raise UsageError(f"{error}: change or remove it in the file ({described(messages)})") from error


def described(messages: Messages) -> str:
    """Return the roles and the first words of a conversation, by which its row can be found in the file."""
    roles = ", ".join(message["role"] for message in messages)
    return f"roles {roles}; it begins with {messages[0]['content'][:60]!r}"


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text that the chat template has written."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # the template contains BOS
