"""Measure a step of the optimizers for LoRA: fused AdamW alone, with ours and PEFT's preconditioner, and of pairs.

    python benchmarks/bench_optimizer.py --shape llama2-7b --ranks 8,16,64 --json bench_optimizer.json --markdown

Random factors of every linear layer of the model, in fp32, as separate parameters like those of PEFT. The cases
alternate on the same factors and gradients; the table shows medians. Own time: a step minus a step of fused AdamW
alone. error: relative error of the preconditioned gradient against eq. 9 in fp64, the largest of all factors. extra
memory: the peak of live tensor bytes in a step. A training step is estimated as the forward and backward pass of ONE
decoder layer with adapters over 256 tokens, times the number of layers, plus our optimizer step; a real batch is
larger.
LoRA-Muon and LoRA-RITE are steps of their own, not preconditioners of AdamW. LoRA-Pro has moments as large as the
weights, so it is measured on ONE decoder layer, and its time and memory are multiplied by the number of layers.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from common import SHAPES, Clock, LiveBytes, Shape, common_arguments, set_threads, write_result
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_one.adaptation.wrapping import quiet_peft
from lora_one.optim import LoraMuon, LoraPro, LoraRite, create_pair_optimizer, create_scaled_optimizer

REG, TOKENS, LARGEST_ERROR = 1e-6, 256, 1e-3
ALONE, OURS, PEFT = "fused AdamW", "ours", "PEFT"
MUON, RITE, PRO = "LoRA-Muon", "LoRA-RITE", "LoRA-Pro"
Make = Callable[..., torch.optim.Optimizer]


class Factors(nn.Module):
    """A and B of one layer (m, n) with PEFT's names."""

    def __init__(self, m: int, n: int, rank: int):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, m, bias=False)})


def adapters(shape: Shape, rank: int) -> nn.ModuleList:
    """Return the factors of all layers: four of the attention and three of the MLP in each decoder layer."""
    small, large = shape.hidden, shape.intermediate
    layer = 4 * [(small, small)] + 2 * [(large, small)] + [(small, large)]
    return nn.ModuleList(Factors(m, n, rank) for m, n in shape.layers * layer)


def makers(device: str) -> dict[str, Make]:
    """Return functions that create the optimizers by name; ``inner`` replaces AdamW when the gradient is checked."""

    def alone(model: nn.Module, inner: type = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
        return inner(model.parameters(), **options)

    def ours(model: nn.Module, inner: type = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
        return create_scaled_optimizer(model, inner, reg=REG, **options)

    def peft(model: nn.Module, inner: type = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
        from peft.optimizers import create_riemannian_optimizer  # not in older versions

        return create_riemannian_optimizer(model, inner, reg=REG, **options)

    return {ALONE: alone, OURS: ours, PEFT: peft}


def pair_makers() -> dict[str, Make]:
    """Return functions that create the optimizers that step both factors of a pair together."""
    return {
        name: lambda model, kind=kind, **options: create_pair_optimizer(model, kind, **options)
        for name, kind in ((MUON, LoraMuon), (RITE, LoraRite))
    }


class Gradients:
    """Random gradients of a model, which are restored before each step because a step may change them."""

    def __init__(self, model: nn.Module):
        self.parameters = list(model.parameters())
        self.values = [1e-3 * torch.randn_like(parameter) for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)

    def restore(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.grad.copy_(value)


def exact(model: nn.Module, gradients: Gradients) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for every factor its gradient after a step, and eq. 9 of the original gradient in fp64."""
    of = dict(zip(map(id, gradients.parameters), gradients.values, strict=True))
    for layer in model:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        damping = REG * torch.eye(len(A), dtype=torch.float64, device=A.device)
        a, b = A.detach().double(), B.detach().double()
        yield A.grad, torch.linalg.solve(b.T @ b + damping, of[id(A)].double())
        yield B.grad, torch.linalg.solve(a @ a.T + damping, of[id(B)].double().T).T


def error_of(make: Make, model: nn.Module, gradients: Gradients) -> float:
    """Return the largest relative error over the factors, from ``grad`` after a step with learning rate 0."""
    gradients.restore()
    make(model, torch.optim.SGD, lr=0.0).step()
    return max(float((found - right).norm() / right.norm()) for found, right in exact(model, gradients))


def measure(shape: Shape, rank: int, device: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Return rows by name: seconds of each repeat, extra memory, error."""
    torch.manual_seed(0)
    with torch.device(device):
        model = adapters(shape, rank)
    gradients = Gradients(model)
    make = makers(device) | pair_makers()
    rows: dict[str, dict[str, Any]] = {}
    for name in make:
        error = error_of(make[name], model, gradients) if name in (OURS, PEFT) else None
        if name == OURS and error > LARGEST_ERROR:
            raise SystemExit(f"r={rank}: the preconditioned gradient has the error {error:.1e}, above {LARGEST_ERROR}")
        rows[name] = {"rank": rank, "error": error, "turns": []}
    optimizers = {name: make[name](model, lr=1e-6, fused=True) for name in make}
    for name, optimizer in optimizers.items():
        gradients.restore()
        optimizer.step()  # creates the moments
        with LiveBytes() as memory:
            optimizer.step()
        rows[name]["peak_extra_mib"] = memory.peak / 2**20
    for turn in range(repeats):
        for name, optimizer in optimizers.items():
            gradients.restore()
            clock = Clock()
            optimizer.step()
            clock.stop()
            rows[name]["turns"].append(clock.seconds)
        shown = ", ".join(f"{name} {row['turns'][-1]:.3f}" for name, row in rows.items())
        print(f"r={rank}, {turn + 1}/{repeats}: {shown}", flush=True)
    return rows


def measure_full_size(shape: Shape, rank: int, device: str, repeats: int) -> dict[str, Any]:
    """Return the row of LoRA-Pro: one decoder layer, times the number of layers. extra memory: with the moments."""
    torch.manual_seed(0)
    with torch.device(device):
        model = adapters(dataclasses.replace(shape, layers=1), rank)
    gradients = Gradients(model)
    gradients.restore()
    optimizer = create_pair_optimizer(model, LoraPro, lr=1e-6)
    with LiveBytes() as memory:
        optimizer.step()  # creates the moments
    turns = []
    for turn in range(repeats):
        gradients.restore()
        clock = Clock()
        optimizer.step()
        clock.stop()
        turns.append(shape.layers * clock.seconds)
        print(f"r={rank}, {turn + 1}/{repeats}: {PRO} {clock.seconds:.3f} x {shape.layers}", flush=True)
    return {"rank": rank, "error": None, "turns": turns, "peak_extra_mib": shape.layers * memory.peak / 2**20}


def passes(shape: Shape, rank: int, device: str, repeats: int) -> float:
    """Return the seconds of forward and backward through one decoder layer, times the number of layers."""
    config = LlamaConfig(
        vocab_size=32,  # makes the cost of the head negligible
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.device(device):
        base = LlamaForCausalLM(config)
    with quiet_peft():
        model = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.base_model.model.enable_input_require_grads()  # as for every layer except the first
    ids = torch.randint(2, 32, (1, TOKENS), device=device)
    seconds = []
    for _ in range(repeats):
        clock = Clock()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        clock.stop()
        seconds.append(clock.seconds)
    return shape.layers * median(seconds)


def summary(found: dict[str, dict[str, Any]], rank: int, whole: float) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the rows and ratios of one rank. whole: seconds of the forward and backward passes."""
    seconds = {name: median(row.pop("turns")) for name, row in found.items()}
    rows = [
        row
        | {
            "name": f"{name}, r={rank}",
            "seconds": seconds[name],
            "own_seconds": seconds[name] - seconds[ALONE] if name in (OURS, PEFT) else None,
            "share_of_training_step": seconds[name] / (whole + seconds[name]),
        }
        for name, row in found.items()
    ]
    own = {row["name"]: row["own_seconds"] for row in rows}
    ratios = {
        "own time, ours / PEFT": own[f"{OURS}, r={rank}"] / own[f"{PEFT}, r={rank}"],
        "step, ours / fused AdamW": seconds[OURS] / seconds[ALONE],
        "step, PEFT / fused AdamW": seconds[PEFT] / seconds[ALONE],
        "step, ours / training step": seconds[OURS] / (whole + seconds[OURS]),
    }
    others = [name for name in found if name not in (ALONE, OURS, PEFT)]
    ratios |= {f"step, {name} / fused AdamW": seconds[name] / seconds[ALONE] for name in others}
    return rows, {f"{name}, r={rank}": ratio for name, ratio in ratios.items()}


FIGURES = {
    "seconds": ("seconds per step", "{:.4f}"),
    "own_seconds": ("own seconds", "{:.4f}"),
    "peak_extra_mib": ("extra memory (MiB)", "{:.1f}"),
    "error": ("error against eq. 9", "{:.0e}"),
    "share_of_training_step": ("share of a training step", "{:.4f}"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser, shape="medium", repeats=11)
    parser.add_argument("--ranks", type=lambda text: [int(rank) for rank in text.split(",")], default=[8])
    chosen = parser.parse_args(arguments)
    set_threads(chosen)
    shape = SHAPES[chosen.shape]
    whole = passes(shape, chosen.ranks[0], chosen.device, min(3, chosen.repeats))
    layer = f"one decoder layer of {TOKENS} tokens x {shape.layers}"
    print(f"forward and backward, {layer}: {whole:.2f} s", flush=True)
    rows: list[dict[str, Any]] = [
        {"name": f"forward and backward, {layer}", "rank": chosen.ranks[0], **dict.fromkeys(FIGURES), "seconds": whole}
    ]
    ratios: dict[str, float] = {}
    for rank in chosen.ranks:
        measured = measure(shape, rank, chosen.device, chosen.repeats)
        extrapolated = f"{PRO}, one decoder layer x {shape.layers}"
        measured[extrapolated] = measure_full_size(shape, rank, chosen.device, min(3, chosen.repeats))
        found, its_ratios = summary(measured, rank, whole)
        rows += found
        ratios |= its_ratios
    settings = {"name": chosen.shape, "ranks": chosen.ranks, "dtype": "float32", "repeats": chosen.repeats}
    write_result(chosen, {"shape": settings, "rows": rows, "ratios": ratios}, FIGURES)


if __name__ == "__main__":
    main()
