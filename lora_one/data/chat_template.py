"""The chat template of a tokenizer, with a date that does not change."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError

from lora_one.errors import UsageError

TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"\\\n]+)(?P=quote)\s*\)""")  # in a template
DATE = datetime(2024, 7, 26)  # for templates that write today's date; the default of Llama 3's
ANSWER = "ANSWER"


def check_template(tokenizer: Any, setting: str = "dataset.chat_template") -> None:
    """Raise UsageError if the tokenizer has no chat template. setting: what asked for it, for the message."""
    if tokenizer.chat_template is None:
        raise UsageError(
            f"{setting}=true, but the model's tokenizer has no chat template: choose a chat model, or set "
            f"{setting}=false"
        )


def templated(tokenizer: Any, messages: Sequence[Any], **options: Any) -> Any:
    """Apply the chat template to conversations. Where it writes today's date, it writes DATE: tokens stay the same.

    Raises UsageError: the template refuses a conversation, or there are several and none is the default.
    """
    try:
        template = TODAY.sub(lambda found: repr(DATE.strftime(found["format"])), tokenizer.get_chat_template())
        return tokenizer.apply_chat_template(messages, chat_template=template, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(f"the tokenizer's chat template refuses a conversation ({error})") from error


def end_of_turn(tokenizer: Any) -> str | None:
    """Return the special token with which the template ends the assistant's turn; None: it is none, or not known."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    try:
        after = templated(tokenizer, turns, tokenize=False).rpartition(ANSWER)[2].lstrip()
    except UsageError:
        return None
    ends = [token for token in tokenizer.get_added_vocab() if after.startswith(token)]
    return max(ends, key=len, default=None)
