"""The arithmetic of the rules."""

import doctest

from lora_one.config import rules


def test_doctests():
    assert doctest.testmod(rules).failed == 0
