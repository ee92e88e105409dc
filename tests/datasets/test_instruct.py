"""The published data sets: a row of the hub's columns becomes exactly the published prompt and answer."""

import pytest

from lora_one.datasets import DATASETS
from tests.helpers.datasets import named_dataset
from tests.helpers.paths import shared


@pytest.mark.parametrize(
    ("file", "rows"), [("alpaca_random_9k.json.gz", 9229), ("code_alpaca_2k.json", 2017), ("alpaca_en_demo.json", 999)]
)
def test_real_alpaca_rows(file, rows):
    found = list(DATASETS["alpaca"].train(named_dataset("alpaca", f"dataset.path={shared(f'data/instruct/{file}')}")))
    assert len(found) == rows and all(example.prompt.endswith("### Response:\n") for example in found)
