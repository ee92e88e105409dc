"""The singular values of a model's gradients: sigma_1 / sigma_9, and the share of ||G||^2 that rank r captures.

    python benchmarks/bench_spectra.py --model <folder> --data_path <gsm8k folder> --json bench_spectra.json --markdown

The mean gradient of every linear layer over GSM8K examples, drawn and computed as with init=gradient, and its exact
singular values. Each row is a type of layer: minimum, median and maximum over the layers of this type.
Without --model: a random Llama of --shape and random examples.
"""

import argparse
from collections.abc import Sequence
from statistics import median

import torch
from bench_init import subject
from common import SHAPES, common_arguments, set_threads, write_result
from torch import Tensor, nn

from lora_one.adaptation.layers import target_layers
from lora_one.initialization.gradients import mean_gradients
from lora_one.losses import Batch
from lora_one.records.folder import locate
from lora_one.runs.composition import compose
from lora_one.runs.parts import load_base, load_parts

RANKS = (8, 16, 64)
QUANTITIES = ("s1/s9", *(f"energy, r={rank}" for rank in RANKS))


def spectrum(G: Tensor) -> dict[str, float]:
    """Return sigma_1 / sigma_9, and ||[G]_r||^2 / ||G||^2 for each rank."""
    squares = torch.linalg.svdvals(G.double()).square()
    energies = {f"energy, r={rank}": float(squares[:rank].sum() / squares.sum()) for rank in RANKS}
    return {"s1/s9": float((squares[0] / squares[8]).sqrt())} | energies


def rows_by_layer_type(found: dict[str, dict[str, float]]) -> list[dict[str, str | int]]:
    """Return a row for each type of layer (the last part of its name), and one for all layers."""
    types: dict[str, list[dict[str, float]]] = {}
    for name, values in found.items():
        types.setdefault(name.rpartition(".")[2], []).append(values)
    rows = []
    for kind, layers in (*types.items(), ("all", list(found.values()))):
        row = {"name": kind, "layers": len(layers)}
        for quantity in QUANTITIES:
            values = [layer[quantity] for layer in layers]
            form = "{:.1f}" if quantity == "s1/s9" else "{:.3f}"
            row[quantity] = " / ".join(form.format(value) for value in (min(values), median(values), max(values)))
        rows.append(row)
    return rows


def real(chosen: argparse.Namespace) -> tuple[nn.Module, dict[str, nn.Module], Sequence[Batch]]:
    """Return the model in fp32, its layers, and the examples that a run with these settings would use."""
    data = ["dataset=gsm8k", f"dataset.path={chosen.data_path}", "dataset.cache=null", f"init.iters={chosen.examples}"]
    model = [f"model.name={chosen.model}", "model=llama", "model.bf16=false", "model.max_length=512"]
    run = compose([*data, *model, "init=gradient", "wandb.mode=disabled"])
    parts = load_parts(run, locate(run).folder)
    base = load_base(parts).requires_grad_(False)
    return base, target_layers(base, run.peft), parts.probe.batches


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_arguments(parser, shape="medium", repeats=1)
    parser.add_argument("--model", metavar="FOLDER")
    parser.add_argument("--data_path", metavar="FOLDER", help="folder of GSM8K")
    parser.add_argument("--examples", type=int, default=8)
    chosen = parser.parse_args(arguments)
    set_threads(chosen)
    if chosen.model:
        model, layers, batches = real(chosen)
    else:
        at = subject(SHAPES[chosen.shape], chosen.device, torch.float32)
        model, layers, batches = at.model, at.layers, at.micro
    found: dict[str, dict[str, float]] = {}
    report = mean_gradients(model, layers, batches, "example", lambda name, G: found.update({name: spectrum(G)}))
    figures = {"layers": ("layers", "{}")} | {name: (f"{name}: min / median / max", "{}") for name in QUANTITIES}
    shape = {"name": chosen.model or chosen.shape, "examples": report.examples, "tokens": report.tokens}
    ratios = {f"{name}, all layers, median": median(row[name] for row in found.values()) for name in QUANTITIES}
    rows = rows_by_layer_type(found)
    write_result(chosen, {"shape": shape, "rows": rows, "layers": found, "ratios": ratios}, figures)


if __name__ == "__main__":
    main()
