"""The start as a whole: its figures, the search for gamma, the cache, and DoRA-One."""

import pytest

from lora_one.errors import RunError
from lora_one.initialization.start_warnings import start_warnings
from lora_one.models import BUNDLED
from tests.helpers.runs import finish, run_config, small_run


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("init.stable_gamma=2",), "raised the loss on its 8 examples from"),
        (("init.stable_gamma=2",), "remove init.stable_gamma (the scale is then searched for), or raise it (now 2)"),
        (("init.scale=unit",), "remove init.scale=unit (the scale is then searched for)"),
        (("init.direction=LoRA-SB", "init.eta=1"), "lower init.eta (now 1)"),
    ],
)
def test_warns_if_the_start_raises_the_loss(tmp_path, capsys, overrides, said):
    """The warning is on the screen and in run.json, with the two losses and the key to change."""
    run = small_run(tmp_path, BUNDLED / "tiny", "model.epochs=0", *overrides)
    record = finish(run).read()["init"]
    (warning,) = record["warnings"]
    assert said in warning and record["loss_after"] > record["loss_before"]
    assert f"{record['loss_before']:.4f}" in warning and f"{record['loss_after']:.4f}" in warning
    shown = capsys.readouterr().out
    assert shown.count(f"WARNING: {warning}") == 2, "at once, and in the summary at the end"
    assert f"(higher by {record['loss_after'] - record['loss_before']:.4f}; first-order prediction: lower by" in shown


def test_warns_if_the_predicted_decrease_exceeds_the_loss():
    record = {"method": "LoRA-One", "examples": 8, "loss_before": 2.0, "predicted_decrease": 2.5, "searched": None}
    init = run_config("init.stable_gamma=128").init
    (warning,) = start_warnings(init, record | {"loss_after": 1.9})
    assert "2.5000" in warning and "2.0000" in warning and "1.9000" in warning and "(now 128)" in warning
    assert start_warnings(init, record | {"loss_after": 1.9, "predicted_decrease": 1.5}) == []
    assert start_warnings(init, record | {"loss_after": 1.9, "searched": {"gamma": 64}}) == []
    assert start_warnings(init, record | {"loss_after": 2.001, "predicted_decrease": 0.0}) == []  # rounding
    assert len(start_warnings(init, record | {"loss_after": 2.01, "searched": {"gamma": 64}})) == 1


def test_warns_if_the_search_left_almost_no_step():
    """As on MiniLM and SST-2 with seed 11: gamma 25,428, 0.6854 -> 0.6849."""
    found = {"gamma": 25428.0, "other_examples": 8}
    record = {"method": "LoRA-One", "examples": 8, "predicted_decrease": 5e-4, "searched": found}
    init = run_config().init
    (warning,) = start_warnings(init, record | {"loss_before": 0.6854, "loss_after": 0.6849})
    assert "almost no step" in warning and "from 0.6854 to 0.6849" in warning and "raise init.iters" in warning
    assert start_warnings(init, record | {"loss_before": 0.6854, "loss_after": 0.6700}) == []
    own = record | {"searched": found | {"other_examples": 0}}
    assert start_warnings(init, own | {"loss_before": 0.6854, "loss_after": 0.6849}) == []


@pytest.mark.parametrize("overrides", [(), ("init.direction=LoRA-GA",), ("init=default",), ("init=svd",)])
def test_a_default_start_warns_of_nothing(tmp_path, llama_folder, overrides):
    run = small_run(tmp_path, llama_folder, "model.epochs=0", *overrides)
    assert finish(run).read()["init"]["warnings"] == []


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (("init.stable_gamma=1e-30",), "remove init.stable_gamma"),
        (("init=gaussian", "init.lora_A_std=1e30", "init.lora_B_std=1e30", "init.lora_B=gaussian"), "lora_A_std"),
    ],
)
def test_start_that_is_not_finite_gives_one_message(tmp_path, llama_folder, overrides, remedy):
    with pytest.raises(RunError, match=rf"is (nan|inf) after the initialisation by .*{remedy}"):
        finish(small_run(tmp_path, llama_folder, "model.epochs=0", *overrides))
