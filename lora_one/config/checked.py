"""Settings classes that state which values their keys may have."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from lora_one.errors import UsageError, nearest

Choices = dict[str, tuple[str, ...]]  # key -> its valid values
Ranges = dict[str, tuple[str, Callable[[Any], bool]]]  # key -> (the rule in words, the rule)

SEED = ("an integer in [0, 2^32)", lambda v: 0 <= v < 2**32)


class CheckedSettings:
    """Base of the settings of one choice in a group (a method of ``init``, an optimizer), a dataclass.

    choices, ranges: the rules for the keys that this class adds to those of its bases.
    """

    section: ClassVar[str]  # the group, as in ``<section>.<key>``
    choices: ClassVar[Choices] = {}
    ranges: ClassVar[Ranges] = {}

    @classmethod
    def value_rules(cls) -> tuple[Choices, Ranges]:
        """Return the rules of this class and of its bases, by ``<section>.<key>``."""
        choices: Choices = {}
        ranges: Ranges = {}
        for kind in cls.__mro__:
            choices |= {f"{cls.section}.{key}": valid for key, valid in vars(kind).get("choices", {}).items()}
            ranges |= {f"{cls.section}.{key}": rule for key, rule in vars(kind).get("ranges", {}).items()}
        return choices, ranges

    def check_values(self) -> None:
        """Check each value by itself. Raises UsageError: see the function ``check_values``."""
        values = {f"{self.section}.{field.name}": getattr(self, field.name) for field in dataclasses.fields(self)}
        check_values(values, *self.value_rules())


def check_values(values: Mapping[str, Any], choices: Choices, ranges: Ranges) -> None:
    """Check each value by itself; null (None) is always valid.

    Raises UsageError: a value is not one of its choices, or it is out of its range.
    """
    for key, valid in choices.items():
        if values.get(key) is not None and values[key] not in valid:
            raise UsageError(f"{key}={values[key]} is not a choice; {nearest(values[key], valid)}")
    for key, (rule, satisfied) in ranges.items():
        value = values.get(key)
        if value is not None and not satisfied(value):
            raise UsageError(f"{key}={value} is out of range: it must be {rule}")
