"""The default settings of a data set, read without Hydra, are those that Hydra composes (the tests have no cache)."""

import dataclasses

import pytest

from lora_one.config.defaults import dataset_settings
from lora_one.datasets import DATASETS
from tests.helpers.datasets import named_dataset


@pytest.mark.parametrize("name", DATASETS)
def test_they_are_those_of_a_run(name, tmp_path):
    found, composed = dataset_settings(name, str(tmp_path)), named_dataset(name, f"dataset.path={tmp_path}")
    assert type(found) is type(composed)
    assert dataclasses.replace(found, cache=None) == composed
