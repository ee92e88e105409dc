"""Keys without an effect: which ones, and that a run says so once for each reason."""

import pytest

from lora_one.config.unread import notes, unread
from tests.helpers.runs import finish, run_config, small_run

OTHER_VALUES = {
    "model.prec_reg": "0.5",
    "peft.loraplus_lr_ratio": "3",
    "peft.lora_r": "2",
    "peft.lora_target_modules": "[q_proj]",
    "peft.lora_alpha": "40",
    "peft.lora_dropout": "0.5",
    "peft.use_rslora": "false",
    "peft.train_embeddings": "true",
}
SETTINGS = {
    "plain": ([], {"model.prec_reg", "peft.loraplus_lr_ratio"}),
    "preconditioned": (["optimizer=scaled_adamw", "peft.use_loraplus=true", "init.direction=LoRA-One"], set()),
    "rank of the width": (["peft.lora_relative_r=0.1"], {"model.prec_reg", "peft.loraplus_lr_ratio", "peft.lora_r"}),
    "adalora": (["peft=adalora"], {"model.prec_reg", "peft.loraplus_lr_ratio", "peft.use_rslora"}),
    "LoRA-SB": (
        ["init.direction=LoRA-SB"],
        {"model.prec_reg", "peft.loraplus_lr_ratio", "peft.lora_alpha", "peft.use_rslora"},
    ),
    "full": (["peft=full_ft"], set(OTHER_VALUES)),
    "full step": (
        ["init=full_step", "peft=full_ft"],
        set(OTHER_VALUES) - {"peft.lora_r", "peft.lora_target_modules"},  # of the layers that are stepped
    ),
}


def losses(results, *overrides):
    """Validation loss after training, and the loss of the last step."""
    record = finish(small_run(results, "bundled/tiny", "dataset.train_size=16", "model.epochs=1", *overrides)).read()
    return record["evaluation"]["final"]["eval_loss"], record["train"]["last_loss"]


@pytest.mark.parametrize(("overrides", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_unread_keys_change_nothing_and_the_others_do(overrides, expected, tmp_path):
    init = [] if any("init" in override for override in overrides) else ["init=lora"]
    overrides = [*init, "model.max_length=64", *overrides]
    assert set(unread(run_config("model=tiny", *overrides))) == expected
    straight = losses(tmp_path, *overrides)
    changes = [f"{key}={OTHER_VALUES[key]}" for key in expected]
    assert losses(tmp_path / "unread", *overrides, *changes) == straight
    for key in OTHER_VALUES.keys() - expected:
        if (key, "init=full_step" in overrides) != ("peft.lora_r", True):  # which is only checked there
            assert losses(tmp_path / key, *overrides, f"{key}={OTHER_VALUES[key]}") != straight, key


def test_each_reason_is_said_once_and_only_of_given_keys():
    run = run_config("model=tiny", "peft=full_ft", "init=lora")
    assert notes(run, ["peft.lora_alpha", "model.learning_rate", "peft.lora_r", "model.prec_reg"]) == [
        "this run does not read peft.lora_alpha, peft.lora_r: peft.use_peft=False trains every weight",
        "this run does not read model.prec_reg: optimizer=adamw has no preconditioners",
    ]
    assert notes(run, ["seed"]) == []
