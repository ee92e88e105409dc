"""What both scores read in a completion, written out by hand: our extractor and the published pattern."""

from decimal import Decimal

import pytest

from lora_one.evaluation.gsm8k import parse, parse_published

# completion, ours (None: unparsed), published (0 where it finds nothing, as its script has it)
TABLE = [
    ("#### 18", "18", 18),
    ("9 * 2 = 18\n#### 18", "18", 18),
    ("####18", "18", 18),
    ("####    18", "18", 18),
    ("####\n18", "18", 18),
    ("#### 18.", "18", 18),
    ("#### 18\n", "18", 18),
    ("#### -18", "-18", 0),
    ("#### \u221218", "-18", 0),
    ("#### +18", "18", 0),
    ("#### - 18", "-18", 0),
    ("#### 0", "0", 0),
    ("#### 007", "7", 7),
    ("#### 1,000", "1000", 1),
    ("#### 1,234,567", "1234567", 1),
    ("#### -1,000", "-1000", 0),
    ("#### 2.5", "2.5", 2),
    ("#### .5", "0.5", 0),
    ("#### 0.25", "0.25", 0),
    ("#### 18.00", "18", 18),
    ("#### 1,234.50", "1234.5", 1),
    ("#### $18", "18", 0),
    ("#### $ 18", "18", 0),
    ("#### $1,450,000", "1450000", 0),
    ("#### -$18", "-18", 0),
    ("#### $-18", "-18", 0),
    ("#### 18%", "18", 18),
    ("#### 12.5%", "12.5", 12),
    ("#### 18 dollars", "18", 18),
    ("#### 18 apples left over", "18", 18),
    ("#### 18\n#### 20", "20", 18),
    ("#### 3 is wrong\nSo again.\n#### 4", "4", 3),
    ("The answer is 18", "18", 0),
    ("The answer is: 18.", "18", 0),
    ("The answer is $1,000.", "1000", 0),
    ("The answer is 3. No: The answer is 4.", "4", 0),
    ("#### 18\nThe answer is: 18", "18", 18),
    ("The answer is: 20\n#### 18", "18", 18),
    ("", None, 0),
    ("18", None, 0),
    ("so that makes 18 eggs", None, 0),
    ("I do not know.", None, 0),
    ("####", None, 0),
    ("#### none", None, 0),
    ("#### eighteen", None, 0),
    ("### 18", None, 0),
    ("the answer is 18", None, 0),
    ("#### 3/4", None, 3),
    ("#### 12:30", None, 12),
]


@pytest.mark.parametrize(("completion", "ours", "published"), TABLE)
def test_parses_every_completion_of_the_table(completion, ours, published):
    assert parse(completion) == (None if ours is None else Decimal(ours))
    assert parse_published(completion) == published


def test_table_has_at_least_40_completions():
    assert len({completion for completion, _, _ in TABLE}) >= 40
