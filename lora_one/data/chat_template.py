"""The chat template of a tokenizer, with a date that does not change."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from lora_one.errors import UsageError

TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.+?)(?P=quote)\s*\)""")  # in a chat template
DATE = datetime(2024, 7, 26)  # for templates that write today's date; the default of Llama 3's


def check_template(tokenizer: Any) -> None:
    """Raise UsageError if the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise UsageError(
            "chat_template=true, but the model's tokenizer has no chat template: choose a chat model, or set it to "
            "false (dataset.chat_template in a run, --chat_template in an evaluation)"
        )


def templated(tokenizer: Any, messages: Sequence[Any], **options: Any) -> Any:
    """Apply the chat template to conversations. Where it writes today's date, it writes DATE: tokens stay the same."""
    template = TODAY.sub(lambda found: repr(DATE.strftime(found["format"])), tokenizer.get_chat_template())
    return tokenizer.apply_chat_template(messages, chat_template=template, **options)
