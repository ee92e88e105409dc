"""How a base is divided: the groups of processes, what each stores and gathers, and what is refused on one process."""

import pytest
import torch
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lora_one.adaptation.layers import lora_layers
from lora_one.distributed import Processes
from lora_one.errors import UsageError
from lora_one.models import load_model, with_shards
from lora_one.runs import experiment
from tests.helpers.runs import adaptation_for, run_config


def model_of(sharded):
    return run_config(f"model.sharded={sharded}", "dataset.accuracy_examples=0").model


@pytest.mark.parametrize(
    ("sharded", "processes", "per_node", "shards"),
    [("false", 8, 4, 1), ("true", 8, 4, 8), ("node", 8, 4, 4), ("node", 4, 4, 4), ("node", 4, 8, 4), ("2", 8, None, 2)],
)
def test_processes_that_share_one_copy(sharded, processes, per_node, shards):
    assert with_shards(model_of(sharded), processes, per_node).shards(processes) == shards


@pytest.mark.parametrize(
    ("sharded", "processes", "per_node", "said"),
    [
        ("node", 1, None, "model.sharded=node distributes the base over several processes, but there is only one"),
        ("node", 8, None, "the same number of processes on each node.*set model.sharded=<number"),
        ("node", 8, 1, "each node has one process .*set model.sharded=true"),
        ("node", 6, 4, r"model.sharded=node \(4 processes\) does not divide the 6 processes .*a divisor of 6"),
        ("3", 8, 4, "model.sharded=3 does not divide the 8 processes .*start a multiple of 3 processes"),
        ("16", 8, 4, "model.sharded=16 does not divide the 8 processes"),
    ],
)
def test_one_message_for_what_cannot_be_divided(sharded, processes, per_node, said):
    with pytest.raises(UsageError, match=said):
        with_shards(model_of(sharded), processes, per_node)


def test_a_library_that_cannot_replicate_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.distributed.DistributedConfig", object)
    with pytest.raises(UsageError, match=r"needs transformers 5.23 or newer: .*or set model.sharded=true"):
        with_shards(model_of(4), 8, 4)
    assert with_shards(model_of(4), 4, 4).sharded == 4, "one copy, so nothing is replicated"


@pytest.mark.parametrize("value", ["1", "0", "-2", "nodes", "2.5"])
def test_other_values_are_refused(value):
    with pytest.raises(UsageError, match=r"model.sharded=.*(must be false, true|has the wrong type)"):
        model_of(value)


def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_loaded(monkeypatch):
    six = Processes(0, 6)
    monkeypatch.setattr(Processes, "started", lambda _: six)
    monkeypatch.setattr(Processes, "current", lambda: six)
    monkeypatch.setattr("lora_one.models.preflight", None)
    with pytest.raises(UsageError, match=r"model\.sharded=4 does not divide the 6 processes"):
        experiment.execute(run_config("model.sharded=4", "dataset.accuracy_examples=0"))


class Gatherings(TorchDispatchMode):
    """The ratio of what a gathering gives to what this process adds to it, of every one."""

    def __init__(self):
        super().__init__()
        self.ratios = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname == "_allgather_base_":
            self.ratios.append(args[0].numel() / args[1].numel())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def four_processes(monkeypatch):
    """Rank 2 of a group whose other processes do not exist: they send nothing."""
    for name, value in {"RANK": 2, "LOCAL_RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("fake", rank=2, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="written for CPUs")
@pytest.mark.parametrize(("shards", "group"), [(2, [2, 3]), (4, [0, 1, 2, 3])])
def test_a_process_stores_its_part_and_gathers_from_its_own_copy(four_processes, shards, group):
    """The last dimension of the mesh is that of the parts; consecutive ranks share a copy."""
    model = load_model("bundled/tiny", dtype="fp32", shards=shards, copies=4 // shards)
    whole = load_model("bundled/tiny", dtype="fp32")
    for sharded, weight in zip(model.parameters(), whole.parameters(), strict=True):
        assert dist.get_process_group_ranks(sharded.device_mesh.get_group(-1)) == group
        assert torch.equal(sharded.to_local(), weight.chunk(shards)[group.index(2)])
    with Gatherings() as seen:
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert seen.ratios and set(seen.ratios) == {float(shards)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="written for CPUs")
def test_adapters_have_the_shapes_of_whole_weights(four_processes):
    base = load_model("bundled/tiny", dtype="fp32", shards=2, copies=2)
    model = adaptation_for(run_config("init=default")).start(base, 0)
    for layer in lora_layers(model).values():
        m, n = layer.get_base_layer().weight.shape
        assert layer.lora_B["default"].weight.shape == (m, 8) and layer.lora_A["default"].weight.shape == (8, n)
