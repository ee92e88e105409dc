"""CodeFeedback: answers with code, truncated after their first code block."""

from collections.abc import Iterator

from lora_one.datasets.instruct import PROMPT
from lora_one.datasets.settings import StreamedConfig
from lora_one.datasets.sources import each_row
from lora_one.types import Example

SOURCE = ("m-a-p/CodeFeedback-Filtered-Instruction", None)
FENCE = "```"


def code_answers(config: StreamedConfig) -> Iterator[Example]:
    """Yield the examples of all rows whose answer has a code block."""
    for row in each_row(SOURCE, config.path, "train", ["query", "answer"], first=config.rows):
        if FENCE in row["answer"]:
            yield Example(PROMPT.format(instruction=row["query"]), first_block(row["answer"]))


def first_block(answer: str) -> str:
    """Return the answer up to the end of its first code block; a block that is not closed gets a closing fence.

    >>> first_block("Try ```x``` or ```y```.")
    'Try ```x```'
    """
    before, code, *_ = answer.split(FENCE)
    return f"{before}{FENCE}{code}{FENCE}"
