"""What the tests of comparisons share."""

from lora_one.runs import cli
from tests.helpers.paths import ROOT

RATE = "model.learning_rate"


def compose(overrides):
    return cli.compose(ROOT / "conf", overrides)
