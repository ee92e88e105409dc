"""The published spelling of init and the files of its methods are the same runs."""

import pytest

from lora_one.config.aliases import DIRECTIONS, OPTIONAL, keys_of
from lora_one.config.methods import METHODS
from lora_one.errors import UsageError
from lora_one.records.folder import locate
from lora_one.records.provenance import ADDED
from tests.helpers.paths import ROOT
from tests.helpers.runs import run_config

# overrides -> the section init as it was before each method had a file; the hash of a run is taken over this form
PUBLISHED = {
    "": {
        "mode": "gradient",
        "dtype": "fp32",
        "seed": None,
        "cache": None,
        "bsz": 1,
        "iters": 8,
        "do_subsampling": False,
        "sub_size": None,
        "max_length": None,
        "direction": "LoRA-One",
        "scale": "search",
        "search_examples": None,
        "normalize": "s0",
        "stable_gamma": None,
        "reduction": "example",
        "tolerance": 0.001,
        "memory": "auto",
        "ga_direction": "ArB2r",
        "eta": None,
    },
    "init.direction=LoRA-GA init.stable_gamma=4": {
        "mode": "gradient",
        "dtype": "fp32",
        "seed": None,
        "cache": None,
        "bsz": 1,
        "iters": 8,
        "do_subsampling": False,
        "sub_size": None,
        "max_length": None,
        "direction": "LoRA-GA",
        "scale": "stable",
        "search_examples": None,
        "normalize": "s0",
        "stable_gamma": 4.0,
        "reduction": "example",
        "tolerance": 0.001,
        "memory": "auto",
        "ga_direction": "ArB2r",
        "eta": None,
    },
    "init.direction=LoRA-SB init.eta=0.01": {
        "mode": "gradient",
        "dtype": "fp32",
        "seed": None,
        "cache": None,
        "bsz": 1,
        "iters": 8,
        "do_subsampling": False,
        "sub_size": None,
        "max_length": None,
        "direction": "LoRA-SB",
        "scale": "stable",
        "search_examples": None,
        "normalize": "s0",
        "stable_gamma": None,
        "reduction": "example",
        "tolerance": 0.001,
        "memory": "auto",
        "ga_direction": "ArB2r",
        "eta": 0.01,
    },
    "init.scale=unit init.normalize=none": {
        "mode": "gradient",
        "dtype": "fp32",
        "seed": None,
        "cache": None,
        "bsz": 1,
        "iters": 8,
        "do_subsampling": False,
        "sub_size": None,
        "max_length": None,
        "direction": "LoRA-One",
        "scale": "unit",
        "search_examples": None,
        "normalize": "none",
        "stable_gamma": None,
        "reduction": "example",
        "tolerance": 0.001,
        "memory": "auto",
        "ga_direction": "ArB2r",
        "eta": None,
    },
    "init=default": {
        "mode": "simple",
        "dtype": "fp32",
        "seed": None,
        "cache": None,
        "lora_A": "kaiming",
        "lora_B": "zeros",
        "lora_A_std": 0.01,
        "lora_B_std": 0.01,
    },
    "init=gaussian init.lora_A_std=0.5": {
        "mode": "simple",
        "dtype": "fp32",
        "seed": None,
        "cache": None,
        "lora_A": "gaussian",
        "lora_B": "zeros",
        "lora_A_std": 0.5,
        "lora_B_std": 0.01,
    },
    "init=svd init.scale=stable init.stable_gamma=4": {
        "mode": "svd",
        "dtype": "fp32",
        "seed": None,
        "cache": None,
        "scale": "stable",
        "stable_gamma": 4.0,
        "tolerance": 0.001,
    },
    "init=lora_xs": {
        "mode": "lora_xs",
        "dtype": "fp32",
        "seed": None,
        "cache": None,
        "lora_R_std": 1e-05,
        "tolerance": 0.001,
    },
    "init=loftq model.quantization=nf4": {
        "mode": "loftq",
        "dtype": "fp32",
        "seed": None,
        "cache": None,
        "tolerance": 0.001,
    },
    "init=pissa init.niter=4": {
        "mode": "peft",
        "dtype": "fp32",
        "seed": None,
        "cache": None,
        "method": "pissa",
        "niter": 4,
        "tolerance": 0.001,
    },
    "init=olora": {"mode": "peft", "dtype": "fp32", "seed": None, "cache": None, "method": "olora"},
    "init=eva": {
        "mode": "peft",
        "dtype": "fp32",
        "seed": None,
        "cache": None,
        "bsz": 8,
        "iters": 1,
        "do_subsampling": False,
        "sub_size": None,
        "max_length": None,
        "method": "eva",
        "tau": 0.99,
        "whiten": False,
    },
    "init=corda init.corda_method=kpm": {
        "mode": "peft",
        "dtype": "fp32",
        "seed": None,
        "cache": None,
        "bsz": 1,
        "iters": 256,
        "do_subsampling": False,
        "sub_size": None,
        "max_length": None,
        "method": "corda",
        "corda_method": "kpm",
    },
    "init=lora_ga_peft init.scale=unit": {
        "mode": "peft",
        "dtype": "fp32",
        "seed": None,
        "cache": None,
        "bsz": 1,
        "iters": 8,
        "do_subsampling": False,
        "sub_size": None,
        "max_length": None,
        "method": "lora_ga_peft",
        "ga_direction": "ArB2r",
        "scale": "unit",
        "stable_gamma": None,
    },
}
SAME = {
    "init=gradient": "init=lora_one",
    "init=gradient init.direction=LoRA-GA": "init=lora_ga",
    "init=gradient init.direction=LoRA-GA init.stable_gamma=4": "init=lora_ga init.stable_gamma=4",
    "init=gradient init.direction=LoRA-SB init.eta=0.01": "init=lora_sb init.eta=0.01",
    "init.stable_gamma=64 peft=dora": "init=lora_one init.scale=stable init.stable_gamma=64 peft=dora",
    "init=default": "init=lora",
    "init=default init.lora_A=gaussian": "init=gaussian",
    "init=kaiming": "init=lora",
    "peft=adalora": "peft=adalora init=lora",
    "peft=full_ft": "peft=full_ft init=lora",
}
FILES = sorted(path.stem for path in (ROOT / "conf/init").glob("[!_]*.yaml"))


@pytest.mark.parametrize("overrides", PUBLISHED, ids=lambda o: o or "default")
def test_a_hash_is_taken_over_the_published_form(overrides):
    later = {key.removeprefix("init."): value for key, value in ADDED.items() if key.startswith("init.")}
    form = run_config(*overrides.split()).published()["init"]
    assert all(form.pop(key, value) == value for key, value in later.items()), "a later key is not set"
    assert form == PUBLISHED[overrides]


@pytest.mark.parametrize("published", SAME)
def test_both_spellings_have_one_folder(published):
    one, two = (run_config(*overrides.split()) for overrides in (published, SAME[published]))
    assert one == two and locate(one).folder.path == locate(two).folder.path


def test_every_method_has_a_file_of_its_name():
    assert set(METHODS) <= set(FILES)


@pytest.mark.parametrize("name", METHODS)
def test_a_file_sets_the_keys_of_its_method(name):
    needed = {"loftq": ["model.quantization=nf4"], "full_step": ["peft=full_ft"]}
    run = run_config(f"init={name}", *needed.get(name, []))
    assert type(run.init) is METHODS[name] and run.init.method == name


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("key", "value"), [("normalize", "none"), ("ga_direction", "ArBr"), ("eta", "0.1"), ("search_examples", "3")]
)
def test_rejects_keys_not_used_by_the_direction(direction, key, value):
    read = key in keys_of(METHODS[DIRECTIONS[direction]])
    assert key in OPTIONAL
    if read:
        run_config(f"init.direction={direction}", f"init.{key}={value}")
        return
    with pytest.raises(UsageError, match=rf"init\.{key}={value} is used only by LoRA.*, not by {direction}: remove it"):
        run_config(f"init.direction={direction}", f"init.{key}={value}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("init=gradient ++init.method=lora_one", "unknown key init.method: init.mode=gradient does not use it"),
        ("init=gradient init.direction=[LoRA-One]", "init.direction=.*is not a choice"),
    ],
)
def test_rejects_values_unknown_to_both_spellings(overrides, said):
    with pytest.raises(UsageError, match=said):
        run_config(*overrides.split())
