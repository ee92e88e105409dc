"""Whole comparisons whose truth is known: a method with a tenth of the learning rate, and one against itself."""

import pytest

from lora_one.reports.pages import printed
from lora_one.runs import comparison, experiment
from lora_one.runs.comparison_file import Comparison
from lora_one.runs.comparison_runners import InThisProcess
from lora_one.runs.composition import compose
from tests.helpers.comparisons import RATE

pytestmark = pytest.mark.slow


def test_a_handicapped_method_is_worse_and_one_against_itself_is_not(tmp_path):
    """Ten steps of the bundled model, five seeds. ``itself`` has other initial factors at each seed."""
    compared = Comparison(
        title="Known truth",
        common=[
            "dataset=arithmetic",
            "dataset.train_size=160",
            "dataset.validation_size=32",
            "dataset.accuracy_examples=0",
            "model.real_batch_size=16",
            "model.per_device_batch_size=16",
            "wandb.mode=disabled",
            f"results_dir={tmp_path / 'results'}",
        ],
        test=["dataset.data_seed=1"],
        test_examples=50,
        tuning_seeds=[1],
        seeds=[11, 12, 13, 14, 15],
        grid={RATE: [5e-3]},
        own_grid={"handicapped": {RATE: [5e-4]}},
        methods={"LoRA": ["init=lora"], "handicapped": ["init=lora"], "itself": ["init=lora", "init.seed=7"]},
        baseline="LoRA",
    )
    record = comparison.compare(compared, compose, InThisProcess(experiment.execute), tmp_path)
    assert not comparison.failed(record)
    (loss,) = record["findings"]
    outcomes = {verdict["method"]: verdict["outcome"] for verdict in loss["verdicts"]}
    assert outcomes == {"handicapped": "worse", "itself": "no difference shown"}
    assert "handicapped is worse than LoRA: +" in printed(record)
