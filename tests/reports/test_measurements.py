"""What a report reads of run.json, metrics.jsonl and diagnostics.jsonl."""

import pytest

from lora_one.reports import measurements


def test_the_history_begins_after_the_initialisation_and_skips_training_losses():
    lines = [{"step": 0, "eval_loss": 2.0, "eval_accuracy": 0.1}, {"step": 1, "loss": 1.9, "epoch": 0.5}]
    lines.append({"step": 2, "eval_loss": 1.5, "epoch": 1.0})
    assert measurements.history(lines) == [
        {"epoch": 0.0, "loss": 2.0, "accuracy": 0.1},
        {"epoch": 1.0, "loss": 1.5, "accuracy": None},
    ]


def test_figures_that_a_start_does_not_have_are_left_out():
    start = {"captured_energy": {"mean": 0.8, "min": 0.1}, "relative_shift": {"a": 0.1, "b": 0.3}, "loss_before": None}
    assert measurements.start_figures(start) == {"captured_energy": 0.8, "shift": 0.3}
    assert measurements.start_figures({"seconds": 1.0}) == {}


def test_angles_are_the_largest_of_each_layer_and_spectra_means_over_layers():
    first = {"BA_singular": [4.0, 2.0], "B_angles": [1.0, 10.0], "A_angles": []}
    second = {"BA_singular": [2.0, 1.0, 0.5], "B_angles": [30.0]}
    found = measurements.adapter_figures([{"layers": {}}, {"layers": {"a": first, "b": second}}])
    assert found == {"spectrum": [pytest.approx(3.0), pytest.approx(1.5)], "B_angles": pytest.approx(20.0)}
    assert measurements.adapter_figures([]) == {}


def test_the_active_method_is_that_of_the_record():
    peft = {"use_peft": True, "lora_r": 8, "lora_alpha": 16.0, "use_rslora": True, "dora": True, "use_loraplus": True}
    peft |= {"loraplus_lr_ratio": 16.0}
    record = {"config": {"peft": peft, "optimizer": {"name": "adamw"}}, "init": {"method": "LoRA"}}
    assert measurements.active_method(record) == "LoRA, r 8, alpha 16, rsLoRA, DoRA, learning rate of B x 16, adamw"
    adalora = {"config": {"peft": peft | {"adalora": True, "dora": False}, "optimizer": {"name": "adamw"}}}
    assert "rsLoRA" not in measurements.active_method(adalora | {"init": {"method": "AdaLoRA"}}), (
        "it has its own scaling"
    )
    chosen = record | {"init": {"method": "GoRA", "ranks": {"q": 3}}}
    assert measurements.active_method(chosen).startswith("GoRA, r 8 on average, alpha 16")
    record = {"config": {"peft": peft | {"use_peft": False}, "optimizer": {"name": "adamw"}}}
    assert measurements.active_method(record | {"init": {"method": "full fine-tuning"}}) == "full fine-tuning, adamw"
