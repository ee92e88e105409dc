"""What is suggested for a key that does not exist."""

import doctest

import pytest

from lora_one.config import known_keys, suggestions


def test_doctests():
    assert doctest.testmod(suggestions).failed == 0


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("learning_rate", "model.learning_rate"),
        ("learning_rte", "model.learning_rate"),
        ("epochs", "model.epochs"),
        ("rank", "peft.lora_r"),
        ("lora_r", "peft.lora_r"),
        ("model.lora_r", "peft.lora_r"),
        ("model.lr", "model.learning_rate"),
        ("lr", "model.learning_rate"),
        ("sed", "seed"),
        ("inti", "init"),
        ("init.gama", "init.stable_gamma"),
        ("dataset.size", "dataset.train_size"),
        ("model.name_or_path", "model.name"),
    ],
)
def test_the_suggestion_may_be_in_another_group(key, expected):
    assert suggestions.meant(key, known_keys()) == [expected]


def test_every_suggested_key_exists():
    assert set(suggestions.OTHER_NAMES.values()) <= known_keys()
    assert not set(suggestions.OTHER_NAMES) & known_keys()
