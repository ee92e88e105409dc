"""Jobs of a sweep are composed as Hydra composes each of them, with the files of equal choices read once."""

from types import SimpleNamespace

import pytest
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
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
]
WRONG = [
    ["init=lora", "+seed=3"],
    ["init=pissa", "init.nothing=3"],
    ["init=nothing"],
    ["init=3"],
    ["seed=1,2"],
    ["seed=a b'"],
]


def test_each_job_is_composed_as_hydra_does_and_fails_as_there(loader):
    own, configuration = loader.load_sweep_config, master(loader, "+hydra.job.env_set.A=b")
    expected = [result(own, configuration, job) for job in [*JOBS, *WRONG]]
    with choices_composed_once():
        for _ in range(2):  # composed, then copied
            assert [result(loader.load_sweep_config, configuration, job) for job in [*JOBS, *WRONG]] == expected
    assert len({repr(entry) for entry in expected}) == len(JOBS) + len(WRONG)


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


@pytest.fixture
def composed(monkeypatch):
    """The jobs that Hydra composes, and whether without an error, within ``choices_composed_once``."""
    jobs = {}
    with choices_composed_once():
        load = ConfigLoaderImpl.load_sweep_config

        def listed(loader, master_config, sweep_overrides):
            jobs[tuple(sweep_overrides)] = False
            found = load(loader, master_config, sweep_overrides)
            jobs[tuple(sweep_overrides)] = True
            return found

        monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", listed)
        yield jobs
        monkeypatch.undo()


def validate(loader, batch):
    """As Hydra's sweeper validates its jobs before it starts them."""
    context = SimpleNamespace(config_loader=loader)
    Sweeper.validate_batch_is_legal(SimpleNamespace(config=master(loader), hydra_context=context), batch)


def test_before_the_first_job_starts_each_new_value_is_composed(loader, composed):
    seeds = [["init=lora", f"seed={seed}", "model.epochs=1"] for seed in (1, 2, 3)]
    rates = [["init=lora", f"seed={seed}", f"model.epochs={epochs}"] for seed in (1, 2, 3) for epochs in (1, 4)]
    others = [["init=lora_one", f"seed={seed}", "model.epochs=1"] for seed in (1, 2, 3)]
    for batch in (seeds, rates, others):
        validate(loader, batch)
    again = [["init=lora", "seed=1", "model={epochs: 2}"]] * 2  # a section
    validate(loader, again)
    assert list(composed) == [*map(tuple, seeds), tuple(rates[1]), *map(tuple, others), tuple(again[0])]


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_what_hydra_refuses_is_refused_before_the_first_job_starts(wrong, loader, composed):
    good = [["init=lora", "seed=1"], ["init=lora", "seed=2"], ["init=pissa", "seed=2"], ["init=lora", "dataset=gsm8k"]]
    validate(loader, good)
    assert all(composed[tuple(job)] for job in good)
    with pytest.raises((HydraException, ValueError)):  # ValueError: a group without a name
        validate(loader, [*good, wrong])


def test_further_folders_of_choices_are_left_to_hydra(loader, tmp_path):
    """Their groups are known after the folders have been added, which only Hydra does."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "one.yaml").write_text("a: 1\n")
    configuration = master(loader, f"hydra.searchpath=[file://{tmp_path}]")
    with choices_composed_once():
        assert loader.load_sweep_config(configuration, ["+mine=one", "seed=1"]).mine == {"a": 1}


def test_folders_of_choices_in_a_primary_configuration_too(tmp_path):
    (tmp_path / "more" / "mine").mkdir(parents=True)
    (tmp_path / "more" / "mine" / "one.yaml").write_text("a: 1\n")
    (tmp_path / "own").mkdir()
    primary = f"defaults: [_self_]\nhydra:\n  searchpath: ['file://{tmp_path / 'more'}']\nseed: 0\n"
    (tmp_path / "own" / "own.yaml").write_text(primary)
    with initialize_config_dir(str(tmp_path / "own"), version_base="1.3"), choices_composed_once():
        loader = GlobalHydra.instance().config_loader()
        configuration = loader.load_configuration("own", [], RunMode.MULTIRUN)
        assert loader.load_sweep_config(configuration, ["+mine=one", "seed=1"]).mine == {"a": 1}


def test_hydra_is_as_before_afterwards():
    before = ConfigLoaderImpl.load_sweep_config
    with pytest.raises(KeyError), choices_composed_once():
        raise KeyError
    assert ConfigLoaderImpl.load_sweep_config is before
