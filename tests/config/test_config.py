"""The conversion of a composed configuration: values that were converted before are copied, not shared."""

from dataclasses import dataclass
from typing import Any

import pytest

from lora_one import config
from lora_one.config import converted
from lora_one.errors import UsageError


@dataclass(frozen=True)
class Settings:
    rate: float
    names: list[str]
    any: Any
    size: int | None = None


GIVEN = {"rate": 1, "names": ["a"], "any": {"b": [1]}, "size": None}


def test_equal_values_are_converted_once_and_copied(monkeypatch):
    merged, original = [], config.typed
    monkeypatch.setattr(
        config, "typed", lambda prefix, given, schema: merged.append(given) or original(prefix, given, schema)
    )
    one, other = (converted("x.", GIVEN, Settings) for _ in range(2))
    assert one == other == Settings(1.0, ["a"], {"b": [1]}, None) and type(other.rate) is float
    assert merged == [GIVEN]
    one.names.append("b")
    one.any["b"].append(2)
    assert converted("x.", GIVEN, Settings) == other
    assert converted("x.", GIVEN | {"rate": 2}, Settings).rate == 2.0 and merged[1:] == [{"rate": 2}]


@pytest.mark.parametrize("value", [True, "1", 1.0, 1])
def test_values_that_look_alike_are_told_apart(value):
    for other in (1, "1", 1.0, True):
        converted("x.", GIVEN | {"any": other}, Settings)
    found = converted("x.", GIVEN | {"any": value}, Settings).any
    assert found == value and type(found) is type(value)


def test_a_wrong_type_is_refused_each_time():
    for _ in range(2):
        with pytest.raises(UsageError, match=r"x\.size='many' has the wrong type: it must be int or null"):
            converted("x.", GIVEN | {"size": "many"}, Settings)


def test_many_different_values_are_forgotten(monkeypatch):
    monkeypatch.setattr(config, "MANY", 20)
    for size in range(100):
        assert converted("x.", GIVEN | {"size": size}, Settings).size == size
        assert len(config._conversions) <= 20 + len(GIVEN)
