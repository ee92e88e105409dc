"""The loop against a hand-written one: same batches, same loss, same weights."""

import pytest

from lora_one.training.loss_curve import LOSS_WINDOW, first_and_last


@pytest.mark.parametrize("count", range(1, 30))
def test_first_and_last_loss_have_no_step_in_common(count):
    losses = [7.0 - 0.1 * step for step in range(count)]
    window = min(LOSS_WINDOW, count // 2) or 1
    found = first_and_last(losses)
    assert found["first_loss"] == pytest.approx(sum(losses[:window]) / window)
    assert found["last_loss"] == pytest.approx(sum(losses[count - window :]) / window)
    assert found["last_loss"] < found["first_loss"] or count == 1


def test_without_losses_there_is_no_first_and_no_last():
    assert first_and_last([]) == {"first_loss": None, "last_loss": None}
