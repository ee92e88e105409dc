"""The loop against a hand-written one: same batches, same loss, same weights."""

import json

import pytest

from lora_one.records.tracking import Tracker
from lora_one.training.job import TrainingJob
from lora_one.training.loop import train
from tests.helpers.examples import examples
from tests.helpers.runs import adaptation_for
from tests.helpers.training import adapted, settings


def stopped_early(folder, losses):
    """Return the steps of a run, one an epoch, whose evaluations return these losses, until early stopping ends it."""
    run = settings("model.epochs=20", "model.early_stopping_patience=2", "model.save_steps=1")
    tracker = Tracker(folder / "metrics.jsonl")
    job = TrainingJob(
        run,
        adaptation_for(run),
        tracker,
        folder / "checkpoints",
        pad_id=0,
        evaluate=lambda model: {"eval_loss": next(losses)},
    )
    return train(adapted(run), examples(6), job)["steps"]


def test_early_stopping_ends_when_the_loss_stops_falling(tmp_path):
    assert stopped_early(tmp_path, iter([3.0, 2.0, 2.5, 2.4, 1.0] + 20 * [0.5])) == 4


@pytest.mark.parametrize("older", [False, True])
def test_early_stopping_remembers_the_evaluations_before_a_resume_point(tmp_path, older):
    """older: the resume point also names transformers' callback, as those of earlier versions do."""

    def interrupted():
        yield from [3.0, 2.0, 2.5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_early(tmp_path, interrupted())
    if older:
        file = tmp_path / "checkpoints/checkpoint-3/trainer_state.json"
        state = json.loads(file.read_text())
        counted = {
            "args": {"early_stopping_patience": 2, "early_stopping_threshold": 0.0},
            "attributes": {"early_stopping_patience_counter": 1},
        }
        state["stateful_callbacks"]["EarlyStoppingCallback"] = counted
        file.write_text(json.dumps(state | {"best_metric": 2.0}))
    assert stopped_early(tmp_path, iter([2.4] + 20 * [0.5])) == 4
