"""The comparison of LoRA-SB's MATH script, on pairs whose results follow from its rules."""

import pytest

from lora_one.evaluation.math import normalized
from lora_one.evaluation.published_equality import equal_as_published

pytest.importorskip("math_verify", reason="MATH is scored by math-verify: pip install -e .[math]")


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("10000", "10,000", True),
        ("60", "60.00", True),
        ("3.1416", "3.14159", True),  # up to 1e-4
        ("3.1416", "3.143", False),
        ("50", "0.50001", True),  # percent, either way
        ("0.7", "70", True),
        ("0.5", "50", False),  # the normalisation writes 0.5 as a fraction
        ("5", "0.5", False),
        ("(1,2)", "1,2", True),
        ("[1,2]", "(1,2)", False),
        ("(0.25,3)", "(25,3.0)", True),  # part by part
        ("(1,2,3)", "(1,2)", False),
        ("\\text{odd}", "\\textodd", True),
        ("x+1", "1+x", True),
        ("x+1", "x-1", False),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("\\frac{22}{7}", "\\pi", True),  # values up to 1e-3
        ("\\frac{3}{4}", "\\frac{7}{8}", False),
        ("7", "", False),
    ],
)
def test_counts_as_equal_what_the_published_script_does(gold, answer, same):
    assert equal_as_published(normalized(gold), normalized(answer)) is same
