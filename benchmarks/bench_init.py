"""Compare initialisations with their unavoidable passes (the floor): time, memory and captured energy.

    python benchmarks/bench_init.py --shape medium --json bench_init.json --markdown

A random Llama and 8 random examples, or --examples. Each case runs once to count live tensor bytes and captured energy,
then `--repeats` times for the clock, in alternation; the table shows the shortest time (official, sketched and LoRA-DA:
that of the first run). The floor is the passes alone, in which the target weights require gradients. The official
setting is our reading of the published code. cpu_seconds counts all threads; with --threads 1 it is valid on a busy
machine too.
"""

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from common import SHAPES, Clock, LiveBytes, Shape, common_arguments, set_threads, write_result
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_one import initialize_adapters
from lora_one.adaptation.layers import lora_layers
from lora_one.initialization.low_rank_step import StepSettings, factorised, low_rank_steps
from lora_one.initialization.methods.lora_one import descent_factors
from lora_one.linalg import LowRank
from lora_one.losses import Batch

RANK, SEED = 8, 0
ONCE = ("official", "sketched", "LoRA-DA")  # cases that take too long for repeats
OFFICIAL_COLUMNS, OFFICIAL_ITERATIONS = 512, 16


@dataclass(frozen=True)
class Subject:
    """The model, its target layers, and the examples as batches of 1 (micro) and as one batch (whole)."""

    model: nn.Module
    layers: dict[str, nn.Linear]
    micro: list[Batch]
    whole: list[Batch]


@dataclass
class Found:
    """Result of one run of a case: times, the factors of each layer (A spans the right space), and the bytes held."""

    clock: Clock
    right: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)  # stored as the other factor, so that its bytes are counted
    held: int = 0


Case = tuple[Callable[[], Found], str]  # the work, and the name of the floor with the same batches


def subject(shape: Shape, device: str, dtype: torch.dtype, examples: int = 8) -> Subject:
    """Return a frozen random Llama of this shape, and random examples."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.length,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    ids = torch.randint(0, shape.vocabulary, (examples, shape.length), device=device)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    micro = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(examples)]
    return Subject(model, layers, micro, [whole])


def backward(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Do the backward passes of the mean loss over all examples, which have the same length."""
    for batch in batches:
        (model(**batch, use_cache=False).loss / len(batches)).backward()


@contextmanager
def requiring_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let the parameters require gradients within the block."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


# The cases. Each times its work itself, because not everything it does counts.


def floor(at: Subject, batches: Sequence[Batch], *, drop: bool = False, keep: dict | None = None) -> Found:
    """Do the passes; autograd sums the gradients of the target weights. drop: free them at once, to count memory."""
    weights = [layer.weight for layer in at.layers.values()]
    with requiring_gradients(weights):
        handles = [w.register_post_accumulate_grad_hook(_forget) for w in weights] if drop else []
        clock = Clock()
        backward(at.model, batches)
        clock.stop()
        for handle in handles:
            handle.remove()
        if keep is not None:
            keep.update({name: layer.weight.grad.float() for name, layer in at.layers.items()})
    return Found(clock)


def _forget(parameter: nn.Parameter) -> None:
    parameter.grad = None


def ours(at: Subject, batches: Sequence[Batch], memory: str) -> Found:
    """Compute gradients, low-rank steps and LoRA-One's factors with lora_one.  held: bytes of gradients and steps."""
    found, steps = Found(Clock()), 0

    def consume(name: str, step: LowRank) -> None:
        found.left[name], found.right[name] = descent_factors(step, normalize="s0")

    def watch(G: Tensor) -> Tensor:
        nonlocal steps
        found.held = max(found.held, steps + G.nbytes)
        steps += RANK * sum(G.shape) * 4
        return G

    settings = StepSettings(singular=RANK, seed=SEED, memory=memory, transform=None if memory == "low" else watch)
    low_rank_steps(at.model, at.layers, batches, "example", settings, consume)
    found.clock.stop()
    return found


def with_library(at: Subject, method: str = "lora_one", **settings: Any) -> Found:
    """Run ``initialize_adapters`` with a method's default settings; LoRA-One's include the search for the scale.

    The time includes the wrapping of the model by PEFT.
    """
    targets = sorted({name.rpartition(".")[2] for name in at.layers})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, use_rslora=True, target_modules=targets, task_type="CAUSAL_LM")
    clock = Clock()
    model = initialize_adapters(at.model, config, at.micro, examples=len(at.micro), method=method, **settings)
    clock.stop()
    right = {name: layer.lora_A["default"].weight.detach() for name, layer in lora_layers(model).items()}
    model.unload()
    return Found(clock, right if method == "lora_one" else {})  # the others' A is not meant to hold G's energy


def low_rank_alone(at: Subject, gradients: dict[str, Tensor]) -> Found:
    """Compute the low-rank steps of given gradients."""
    found = Found(Clock())
    for name, G in gradients.items():
        found.right[name] = factorised(name, G, StepSettings(singular=RANK, seed=SEED)).Vh
    found.clock.stop()
    return found


def official(at: Subject) -> Found:
    """Official setting: gradients of all parameters, moved to the CPU per micro-batch; svd_lowrank(q=512, niter=16)."""
    found = Found(Clock())
    totals: dict[str, Tensor] = {}
    with requiring_gradients(list(at.model.parameters())):
        for batch in at.micro:
            at.model(**batch, use_cache=False).loss.backward()
            for name, parameter in at.model.named_parameters():
                gradient = parameter.grad.clone().cpu()
                totals[name] = totals[name] + gradient if name in totals else gradient
                parameter.grad = None
    for name in at.layers:
        G = totals[f"{name}.weight"] / len(at.micro)
        q = min(OFFICIAL_COLUMNS, *G.shape)
        _, S, V = torch.svd_lowrank(G.float().to(at.model.device), q=q, niter=OFFICIAL_ITERATIONS)
        found.right[name] = (S[:RANK] / S[0]).sqrt()[:, None] * V[:, :RANK].T
    found.clock.stop()
    return found


def peft_lora_ga(at: Subject) -> Found:
    """Run PEFT's LoRA-GA on a copy of the model, because it changes the base."""
    from peft import LoraGAConfig  # not in older versions
    from peft.tuners.lora import preprocess_loraga

    base = copy.deepcopy(at.model)
    targets = sorted({name.rpartition(".")[2] for name in at.layers})
    config = LoraConfig(
        r=RANK,
        target_modules=targets,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # about hooks on the first layer, and about deprecated names in transformers
        warnings.simplefilter("ignore")
        clock = Clock()
        preprocess_loraga(base, config, lambda: backward(base, at.whole))
        model = get_peft_model(base, config)
        clock.stop()
    wrapped = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    return Found(clock, {name: wrapped[name].lora_A["default"].weight.detach() for name in at.layers})


# Measurements


def least_energy(right: dict[str, Tensor], gradients: dict[str, Tensor], best: dict[str, float]) -> float:
    """Return the minimum over layers of ||G P||^2 / ||[G]_r||^2, where P projects onto the row space of A (r, n)."""
    shares = []
    for name, A in right.items():
        basis = torch.linalg.qr(A.float().T).Q
        shares.append(float((gradients[name] @ basis).square().sum()) / best[name])
    return min(shares)


def cases_of(at: Subject, many: str, one: str, gradients: Callable[[], dict[str, Tensor]]) -> dict[str, Case]:
    """Return name -> case. many, one: the names of the batches; gradients: computes the exact ones, once."""
    return {
        f"floor, {many}": (lambda: floor(at, at.micro), f"floor, {many}"),
        f"floor, {one}": (lambda: floor(at, at.whole), f"floor, {one}"),
        f"device, {many}": (lambda: ours(at, at.micro, "fast"), f"floor, {many}"),
        f"device, {one}": (lambda: ours(at, at.whole, "fast"), f"floor, {one}"),
        f"fused, {one}": (lambda: ours(at, at.whole, "auto"), f"floor, {one}"),
        f"sketched, {many}": (lambda: ours(at, at.micro, "low"), f"floor, {many}"),
        f"with search, {many}": (lambda: with_library(at), f"floor, {many}"),
        f"GoRA, {many}": (lambda: with_library(at, "gora"), f"floor, {many}"),
        f"LoRA-DA, {many}": (
            lambda: with_library(at, "lora_da", train_examples=100_000, memory="fast"),
            f"floor, {many}",
        ),
        "low-rank step alone": (lambda: low_rank_alone(at, gradients()), f"floor, {one}"),
        f"PEFT LoRA-GA, {one}": (lambda: peft_lora_ga(at), f"floor, {one}"),
        f"official, {many}": (lambda: official(at), f"floor, {many}"),
    }


def measure(at: Subject, repeats: int, skip: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Run all cases; return their rows and the ratios of their times."""
    many, one = f"{len(at.micro)} batches of 1", f"1 batch of {len(at.micro)}"

    @cache
    def gradients() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        floor(at, at.micro, keep=found)
        return found

    @cache
    def best() -> dict[str, float]:
        print("exact spectra", flush=True)
        return {name: float(torch.linalg.svdvals(G)[:RANK].square().sum()) for name, G in gradients().items()}

    cases = cases_of(at, many, one, gradients)
    cases = {name: case for name, case in cases.items() if not any(word in name for word in skip)}
    once = {name for name in cases if name.startswith(ONCE)}
    bare = {}
    for name in {floor_name for _, floor_name in cases.values()}:
        with LiveBytes() as memory:  # each batch of 1 needs the same memory
            floor(at, at.whole if name == f"floor, {one}" else at.micro[:1], drop=True)
        bare[name] = memory.peak
    rows: dict[str, dict[str, Any]] = {}
    times: dict[str, list[Clock]] = {}
    for name, (work, floor_name) in cases.items():
        with LiveBytes() as memory:
            found = work()
        times[name] = [found.clock] if name in once else []
        row = rows[name] = {"name": name, "seconds": None, "cpu_seconds": None, "ratio_to_floor": None}
        row["energy"] = least_energy(found.right, gradients(), best()) if found.right else None
        row["peak_extra_mib"] = (memory.peak - (0 if name == "low-rank step alone" else bare[floor_name])) / 2**20
        if name.startswith("fused"):
            largest = max(layer.weight.numel() for layer in at.layers.values()) * 4
            row["held_to_largest_gradient"] = found.held / largest
        print(f"first run: {found.clock.cpu_seconds:.2f} CPU seconds", row, flush=True)
    for turn in range(repeats):
        for name, (work, _) in cases.items():
            if name not in once:
                times[name].append(work().clock)
                print(f"{turn + 1}/{repeats} {name}: {times[name][-1].cpu_seconds:.2f} CPU seconds", flush=True)
    for name, row in rows.items():
        row["seconds"] = min(clock.seconds for clock in times[name])
        row["cpu_seconds"] = min(clock.cpu_seconds for clock in times[name])
    for name, (_, floor_name) in cases.items():
        rows[name]["ratio_to_floor"] = rows[name]["seconds"] / rows[floor_name]["seconds"]
    ratios = {f"{name} / floor": row["ratio_to_floor"] for name, row in rows.items() if not name.startswith("floor")}
    reference = rows.get(f"official, {many}")
    if reference:
        for name in (f"device, {many}", f"device, {one}", f"fused, {one}"):
            ratios[f"official / {name}"] = reference["seconds"] / rows[name]["seconds"]
    if f"fused, {one}" in rows:
        ratios["fused: held / largest gradient"] = rows[f"fused, {one}"]["held_to_largest_gradient"]
    return list(rows.values()), ratios


FIGURES = {
    "seconds": ("seconds", "{:.2f}"),
    "cpu_seconds": ("CPU seconds", "{:.2f}"),
    "ratio_to_floor": ("ratio to floor", "{:.2f}"),
    "energy": ("energy, minimum over layers", "{:.5f}"),
    "peak_extra_mib": ("extra memory (MiB)", "{:.0f}"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser, shape="medium", repeats=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--examples", type=int, default=8, metavar="N", help="number of examples (%(default)s)")
    parser.add_argument("--skip", nargs="*", default=[], metavar="WORD", help="leave out cases with WORD in their name")
    chosen = parser.parse_args(arguments)
    set_threads(chosen)
    at = subject(SHAPES[chosen.shape], chosen.device, getattr(torch, chosen.dtype), chosen.examples)
    rows, ratios = measure(at, chosen.repeats, chosen.skip)
    settings = {"rank": RANK} | {name: getattr(chosen, name) for name in ("dtype", "examples", "repeats")}
    write_result(chosen, {"shape": {"name": chosen.shape} | settings, "rows": rows, "ratios": ratios}, FIGURES)


if __name__ == "__main__":
    main()
