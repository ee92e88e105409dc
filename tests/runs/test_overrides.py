"""Published spellings, and the order of flags and overrides."""

import doctest
from pathlib import Path

import pytest

from lora_one.runs import overrides
from lora_one.runs.overrides import translate


def test_doctests():
    assert doctest.testmod(overrides).failed == 0


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("+init=gradient", "init=gradient"),
        ("++init=gradient,default", "init=gradient,default"),
        ("+peft=qv", "peft=qv"),
        ("++dataset_name=meta_math", "dataset=meta_math"),
        ("+dataset_name=a,b", "dataset=a,b"),
        ("dataset_name=gsm8k", "dataset=gsm8k"),
        ("++init.weight=stable", "init.scale=stable"),
        ("++peft.lora_r=8", "++peft.lora_r=8"),
        ("wandb.name=x=y", "wandb.name=x=y"),
        ("results_dir=~/a,~/b", f"results_dir={Path.home()}/a,{Path.home()}/b"),
        ("-m", "-m"),
        ("--cfg=job", "--cfg=job"),
    ],
)
def test_translation(published, ours):
    assert translate([published]) == [ours]


def test_flags_may_follow_overrides_which_keep_their_order():
    given = ["seed=1", "--config-dir", "mine", "++seed=2", "-m", "~experiment", "--cfg", "job"]
    assert translate(given) == ["--config-dir", "mine", "-m", "--cfg", "job", "seed=1", "++seed=2", "~experiment"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["init=lora", "--info"], ["--info=all", "init=lora"]),
        (["-i", "init=lora"], ["--info=all", "init=lora"]),
        (["seed=1", "--config-dir", "a/c=d"], ["--config-dir", "a/c=d", "seed=1"]),
        (["-cn", "x=y", "seed=1", "-sc", "install=bash"], ["-cn", "x=y", "-sc", "seed=1", "install=bash"]),
    ],
)
def test_a_flag_keeps_its_value_and_takes_no_override(given, expected):
    assert translate(given) == expected
