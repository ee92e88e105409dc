"""Several processes give what one gives: the same gradients, the same factors, the same errors, on every rank."""

import warnings
from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lora_one.adaptation import layers as adapters
from lora_one.data.encode import batches_of
from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.initialization import holding
from lora_one.initialization import low_rank_step as steps
from lora_one.initialization.full_step import full_step
from lora_one.initialization.gradients import mean_gradients
from lora_one.initialization.low_rank_step import StepSettings, low_rank_steps
from lora_one.initialization.methods import build_init
from lora_one.initialization.solution import Probe
from lora_one.initialization.start import attach_adapters
from lora_one.losses import loss_count, loss_sum, targets
from lora_one.optim import AdamW, create_scaled_optimizer
from tests.helpers.examples import autograd_gradients, examples, linear_layers
from tests.helpers.models import Experts, random_llama
from tests.helpers.processes import results_of
from tests.helpers.runs import adaptation_for, run_config

EXAMPLES = 5
CASES = [  # memory, examples a batch (so 5, 3 and 1 batches), dtype
    ("fast", 1, torch.float32),
    ("fast", 5, torch.float32),
    ("low", 1, torch.float32),
    ("low", 5, torch.float32),
    ("fast", 1, torch.float64),
    ("fast", 2, torch.float64),
    ("fast", 5, torch.float64),
    ("low", 1, torch.float64),
    ("low", 5, torch.float64),
]
# near-equal singular values magnify the rounding of a sum whose order differs
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-6}
REFUSED = ["unused", "zero", "not finite"]


def model_for_ranks():
    return random_llama(hidden_size=64, intermediate_size=80)  # more rows and columns than a sketch has


def factors(memory, batch_size, dtype):
    """B and A of every layer, how often each was factorised here, and the gradient's report."""
    counted = Counter()
    original = steps.factorised

    def factorised(name, G, settings):
        counted[name] += 1
        return original(name, G, settings)

    steps.factorised = factorised
    run = run_config("peft.lora_r=4")
    probe = Probe(batches_of(examples(EXAMPLES), batch_size, 0), "example", StepSettings(memory=memory))
    base = model_for_ranks().to(dtype)
    try:
        model, start = attach_adapters(base, adaptation_for(run), build_init(run.init), probe, seed=0)
    finally:
        steps.factorised = original
    found = {
        name: (layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach())
        for name, layer in adapters.lora_layers(model).items()
    }
    return (
        found,
        counted,
        (start.solution.examples.examples, start.solution.examples.tokens, start.solution.examples.loss),
    )


def unequal_experts(memory):
    """Layers that only some batches reach, so that on some processes they take no part; and one that none reaches."""

    class Routed(Experts):
        def forward(self, input_ids, **kwargs):
            self.used = (0, 1) if input_ids.shape[1] < 12 else (0, 2)  # the first example alone is shorter than 12
            return super().forward(input_ids, **kwargs)

    model = Routed()
    layers = {f"experts.{index}": model.experts[index] for index in range(3)}
    found = {}
    batches = batches_of(examples(EXAMPLES, vocabulary=64), 1, 0)
    settings = StepSettings(singular=16, tolerance=1e-6, memory=memory)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fewer usable directions")  # one example reaches expert 1
        low_rank_steps(model, layers, batches, "example", settings, found.__setitem__)
    return {name: step.U * step.S @ step.Vh for name, step in found.items()}


def refusal(kind):
    """The message of an error that only one process can see for itself."""
    rank = Processes.current().rank
    model, settings = Experts(used=(0,)), StepSettings(singular=4, memory="fast")
    layers = {f"experts.{index}": model.experts[index] for index in ((0, 1) if kind == "unused" else (0,))}
    if kind == "zero":
        model.head.weight.zero_()
    if kind == "not finite" and rank == 0:
        model.head.weight.fill_(float("nan"))
    try:
        batches = batches_of(examples(EXAMPLES, vocabulary=64), 1, 0)
        low_rank_steps(model, layers, batches, "example", settings, lambda name, step: None)
    except ValueError as error:
        return str(error)
    return "no error"


def least_room_decides():
    """Every process takes the way of holding of the one with the least free memory."""
    layers, batches = linear_layers(model_for_ranks()), batches_of(examples(EXAMPLES), 1, 0)

    class Memory:
        available = 0 if Processes.current().rank == 1 else 2**40

    original, holding.psutil.virtual_memory = holding.psutil.virtual_memory, lambda: Memory
    try:
        return holding.how_to_hold(layers, batches, "auto", whole=False, activations=lambda: 0).place
    finally:
        holding.psutil.virtual_memory = original


def sharded_gradients(checkpointing):
    """Gradients of a model whose decoder layers and root are sharded over the processes, summed onto each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = model_for_ranks()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    layers = linear_layers(model)
    local = layers["model.layers.0.mlp.up_proj"].weight.to_local().shape
    found = {}
    mean_gradients(
        model,
        layers,
        batches_of(examples(EXAMPLES), 1, 0),
        "example",
        found.__setitem__,
        checkpointing=checkpointing,
    )
    sketched = {}
    settings = StepSettings(singular=4, tolerance=1e-8, memory="low", checkpointing=checkpointing)
    low_rank_steps(
        model, layers, batches_of(examples(EXAMPLES), 2, 0), "example", settings, lambda n, s: sketched.update({n: s.S})
    )
    return found, sketched, tuple(local)


def scaled_steps(count):
    """Adapter after three steps of scaled AdamW on one batch, which the processes share out; behind DDP if several."""
    run = run_config("init=gaussian", "init.lora_B=gaussian", "peft.lora_r=4")
    base = model_for_ranks().double()
    model = attach_adapters(base, adaptation_for(run), build_init(run.init), None, seed=0)[0].double()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if count > 1 else model
    optimizer = create_scaled_optimizer(wrapped, AdamW, lr=1e-3, reg=1e-2, correct_bias=False)
    data = examples(6)
    (mine,) = batches_of(data[Processes.current().rank :: count], 6, 0)
    tokens = sum(loss_count(targets(batch), "token") for batch in batches_of(data, 1, 0))
    for _ in range(3):
        optimizer.zero_grad()
        logits = wrapped(input_ids=mine["input_ids"], attention_mask=mine["attention_mask"]).logits
        (loss_sum(logits, targets(mine), "token") * count / tokens).backward()  # DDP takes the mean
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def stepped():
    """The weights and gamma after a searched step with the full gradient, in fp64."""
    model, batches = model_for_ranks().double(), batches_of(examples(EXAMPLES), 1, 0)
    start = full_step(model, linear_layers(model), Probe(batches, "example"), None)
    return {name: value.detach() for name, value in model.named_parameters()}, start.solution.gamma


def ranked(batch_size):
    """The factors of a start that chooses the ranks, and the message for a layer that only its owner measures."""
    run = run_config("init=gora", "init.min_rank=2", "peft.lora_r=4")
    probe = Probe(batches_of(examples(EXAMPLES), batch_size, 0), "example", StepSettings(memory="fast"))
    method, lora = build_init(run.init), adaptation_for(run)
    _, start = attach_adapters(model_for_ranks(), lora, method, probe, seed=0)

    def measure(view, G):
        return method.measure(view, G * float("inf") if view.name.endswith("1.mlp.up_proj") else G)

    try:
        attach_adapters(model_for_ranks(), lora, replace(method, measure=measure), probe, seed=0)
    except RunError as error:
        return start.solution, str(error)
    return start.solution, "no error"


def with_moments():
    """The factors of a method that uses second moments, from examples that the processes share out."""
    run = run_config("init=lora_da", "peft.lora_r=4", "init.train_examples=100", "init.damping=1e-3")
    probe = Probe(batches_of(examples(EXAMPLES), 2, 0), "example", vectors=True)
    base = model_for_ranks().double()
    _, start = attach_adapters(base, adaptation_for(run), build_init(run.init), probe, seed=0)
    found = start.solution.factors
    pairs = {name: (found[name].B, found[name].A, *start.solution.vectors[name]) for name in found}
    return pairs, start.solution.predicted_decrease


def results(count):
    found = {case: factors(*case) for case in CASES}
    found |= {f"experts {memory}": unequal_experts(memory) for memory in ("fast", "low")}
    found |= {f"refused {kind}": refusal(kind) for kind in REFUSED}
    found["scaled steps"] = scaled_steps(count)
    found["full step"] = stepped()
    found |= {f"ranked {batch_size}": ranked(batch_size) for batch_size in (1, 5)}
    found["moments"] = with_moments()
    if count > 1:
        found["hold"] = least_room_decides()
    if count == 2:
        found |= {f"sharded {checkpointing}": sharded_gradients(checkpointing) for checkpointing in (False, True)}
    return found


def work(rank, folder):
    """One process: among three, then among two."""
    torch.set_num_threads(1)
    for count in (3, 2):
        if rank >= count:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting-{count}",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=180),
        )
        torch.save(results(count), f"{folder}/{count}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """{number of processes: what each rank found}; the processes are started once."""
    folder = results_of(work, 3, "start", tmp_path_factory)
    return {n: [torch.load(folder / f"{n}-{r}.pt", weights_only=False) for r in range(n)] for n in (2, 3)}


@pytest.fixture(scope="module")
def alone():
    return results(1)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_factors_as_one_process(ranks, alone, case, count):
    expected, _, (number, tokens, loss) = alone[case]
    for found, _, report in (rank[case] for rank in ranks[count]):
        assert found.keys() == expected.keys() and len(found) == 14
        for name in expected:
            for mine, theirs in zip(found[name], expected[name], strict=True):
                assert (mine - theirs).norm() <= BOUNDS[case[2]] * theirs.norm(), name
        assert report[:2] == (number, tokens) and report[2] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_agree_bit_for_bit(ranks, case, count):
    first, *others = (rank[case][0] for rank in ranks[count])
    for other in others:
        for name, pair in first.items():
            assert torch.equal(pair[0], other[name][0]) and torch.equal(pair[1], other[name][1]), name


@pytest.mark.parametrize("count", [2, 3])
def test_every_layer_is_factorised_once_and_the_work_is_spread(ranks, count):
    for case in CASES:
        counts = [rank[case][1] for rank in ranks[count]]
        total = sum(counts, Counter())
        if case[0] == "low" and case[1] < EXAMPLES:  # sketched: no gradient to factorise
            assert not total
            continue
        assert len(total) == 14 and set(total.values()) == {1}
        assert max(map(len, counts)) - min(map(len, counts)) <= 1


@pytest.mark.parametrize("count", [2, 3])
def test_the_same_full_step(ranks, alone, count):
    weights, gamma = alone["full step"]
    (first, _), *others = (rank["full step"] for rank in ranks[count])
    for found, searched in (rank["full step"] for rank in ranks[count]):
        assert searched == pytest.approx(gamma, rel=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)
    for other, _ in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("count", [2, 3])
def test_the_same_ranks_and_factors(ranks, alone, count, batch_size):
    """Also: a gradient that is not finite, which one process sees, stops all of them with the same message."""
    expected, refused = alone[f"ranked {batch_size}"]
    (first, message), *others = (rank[f"ranked {batch_size}"] for rank in ranks[count])
    assert first.ranks == expected.ranks and len(set(first.ranks.values())) > 2
    assert "up_proj contains values that are not finite" in refused
    assert first.predicted_decrease == pytest.approx(expected.predicted_decrease, rel=1e-5)
    for name, one in expected.factors.items():
        assert torch.equal(first.factors[name].A, one.A)
        assert (first.factors[name].B - one.B).norm() <= 1e-5 * one.B.norm(), name
    for other, said in others:
        assert other.ranks == first.ranks and said == message == refused
        for name, one in first.factors.items():
            assert torch.equal(other.factors[name].A, one.A) and torch.equal(other.factors[name].B, one.B), name


@pytest.mark.parametrize("count", [2, 3])
def test_the_same_factors_from_second_moments(ranks, alone, count):
    expected, decrease = alone["moments"]
    (first, _), *others = (rank["moments"] for rank in ranks[count])
    assert all(rank["moments"][1] == pytest.approx(decrease, rel=1e-5) for rank in ranks[count])
    for name, parts in expected.items():
        for mine, theirs in zip(first[name], parts, strict=True):
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm(), name
        for other, _ in others:
            assert all(map(torch.equal, first[name], other[name])), name


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("count", [2, 3])
def test_layer_used_on_some_processes_only(ranks, alone, count, memory):
    expected = alone[f"experts {memory}"]
    for found in (rank[f"experts {memory}"] for rank in ranks[count]):
        for name in expected:
            assert (found[name] - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("count", [2, 3])
def test_every_process_stops_with_the_same_message(ranks, alone, count, kind):
    """Also where only one of them sees the reason: none is left waiting for the others."""
    words = {"unused": "experts.1 got no gradient", "zero": "experts.0 is zero", "not finite": "examples is nan"}
    assert words[kind] in alone[f"refused {kind}"]
    assert {rank[f"refused {kind}"] for rank in ranks[count]} == {alone[f"refused {kind}"]}


@pytest.mark.parametrize("count", [2, 3])
def test_the_process_with_the_least_memory_decides_for_all(ranks, count):
    assert {rank["hold"] for rank in ranks[count]} == {"sketch"}


@pytest.mark.parametrize("count", [2, 3])
def test_scaled_steps_are_those_of_one_process_and_the_same_on_every_rank(ranks, alone, count):
    first, *others = (rank["scaled steps"] for rank in ranks[count])
    for name, expected in alone["scaled steps"].items():
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-5, msg=name)  # a step is 1e-3
        assert all(torch.equal(other[name], first[name]) for other in others), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_model_gives_full_gradients(ranks, checkpointing):
    expected = autograd_gradients(model_for_ranks(), examples(EXAMPLES), "example")
    found = {}
    for gradients, sketched, local in (rank[f"sharded {checkpointing}"] for rank in ranks[2]):
        assert local == (40, 64)  # half of up_proj's 80 x 64
        assert not found.keys() & gradients.keys()
        found |= gradients
        for name, G in expected.items():
            torch.testing.assert_close(sketched[name], torch.linalg.svdvals(G)[:4], rtol=1e-4, atol=0, msg=name)
    assert found.keys() == expected.keys()
    for name, G in expected.items():
        assert (found[name] - G).norm() <= 1e-5 * G.norm(), name
