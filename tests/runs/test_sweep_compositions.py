"""Jobs of a sweep are composed as Hydra composes each of them, with the files of equal choices read once."""

import pytest
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from lora_one.config.defaults import configuration_folder
from lora_one.runs.sweep_compositions import choices_composed_once


@pytest.fixture
def loader():
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def master(loader, *arguments):
    return loader.load_configuration("config", ["init=lora,lora_one", *arguments], RunMode.MULTIRUN)


def flags(node, found=None):
    """The path, the flags and the types of a node and of all below it."""
    found = [] if found is None else found
    kinds = node._metadata.ref_type, node._metadata.object_type
    found.append((node._get_full_key(None), dict(node._metadata.flags or {}), kinds))
    if OmegaConf.is_dict(node) and not node._is_none():
        for key in node:
            flags(node._get_node(key), found)
    return found


def result(load, configuration, job):
    """The composed configuration as it is printed, or its error."""
    try:
        found = load(configuration, list(job))
    except Exception as error:
        return type(error), str(error)
    return OmegaConf.to_yaml(found), flags(found)


JOBS = [
    ["init=lora", "seed=1", "model.learning_rate=1e-3", "++model.epochs=2", "wandb.tags=[a,b]"],
    ["init=lora", "seed=2"],
    ["init=lora_one", "seed=2", "dataset=gsm8k"],
    ["init=lora", "results_dir=/x/${seed}", "model={name: other}"],
    ["peft=full_ft"],
    ["experiment=lora_ga_gsm8k", "seed=3"],
    ["~seed"],
    ["hydra.verbose=true", "seed=1"],
    ["init=lora", "+seed=3"],  # errors from here on
    ["init=pissa", "init.nothing=3"],
    ["init=nothing"],
    ["init=3"],
    ["seed=1,2"],
    ["seed=a b'"],
]


def test_each_job_is_composed_as_hydra_does_and_fails_as_there(loader):
    own, configuration = loader.load_sweep_config, master(loader, "+hydra.job.env_set.A=b")
    expected = [result(own, configuration, job) for job in JOBS]
    with choices_composed_once():
        for _ in range(2):  # composed, then copied
            assert [result(loader.load_sweep_config, configuration, job) for job in JOBS] == expected
    assert len({repr(entry) for entry in expected}) == len(JOBS)


def test_the_files_of_equal_choices_are_read_once(loader, monkeypatch):
    read, original = [], OmegaConf.load
    monkeypatch.setattr(OmegaConf, "load", lambda file: read.append(file.name) or original(file))
    configuration = master(loader)
    with choices_composed_once():
        loader.load_sweep_config(configuration, ["init=lora", "seed=0"])
        first = len(read)
        for seed in range(50):
            loader.load_sweep_config(configuration, ["init=lora", f"seed={seed}"])
        assert len(read) == first
        loader.load_sweep_config(configuration, ["init=lora_one", "seed=0"])
        assert len(read) > first


def test_jobs_share_nothing(loader):
    with choices_composed_once():
        one, other = (loader.load_sweep_config(master(loader), ["init=lora", "wandb.tags=[a]"]) for _ in range(2))
    OmegaConf.set_struct(one, False)
    one.wandb.tags.append("b")
    one.new = 1
    assert other.wandb.tags == ["a"] and "new" not in other


def test_further_folders_of_choices_are_left_to_hydra(loader, tmp_path):
    """Their groups are known after the folders have been added, which only Hydra does."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "one.yaml").write_text("a: 1\n")
    configuration = master(loader, f"hydra.searchpath=[file://{tmp_path}]")
    with choices_composed_once():
        assert loader.load_sweep_config(configuration, ["+mine=one", "seed=1"]).mine == {"a": 1}


def test_hydra_is_as_before_afterwards():
    before = ConfigLoaderImpl.load_sweep_config
    with pytest.raises(KeyError), choices_composed_once():
        raise KeyError
    assert ConfigLoaderImpl.load_sweep_config is before
