"""Print what a dry run predicts for LLaMA shapes of 7B, 13B and 70B parameters on 1, 8 and 64 processes.

    python benchmarks/scale_plan.py --hardware h100

Only a config.json is needed, which this script writes; nothing is loaded or started. 64 examples of 1,024 tokens for
each step, one at a time; LoRA-One on 64 examples; r = 8, every linear layer. `lora_one/runs/` has the formulas.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lora_one.adaptation.selection import adaptation_of
from lora_one.config.hardware import read_hardware
from lora_one.models import load_skeleton
from lora_one.reports.table import markdown
from lora_one.runs.composition import compose
from lora_one.runs.planned_run import PlannedRun
from lora_one.runs.scale_plan import modes_of, planned_bases, row, smallest

SHAPES = {  # hidden and intermediate width, blocks, heads, heads of keys and values
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
}
PROCESSES = (1, 8, 64)
BASES = ("whole, bf16", "whole, nf4", "sharded, bf16")
EXAMPLES = 100_000


def write_config(folder: Path, name: str) -> Path:
    """Write the config.json of LLaMA 2 of this size into a new folder, and return the folder."""
    hidden, intermediate, layers, heads, pairs = SHAPES[name]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": pairs,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    place = folder / f"llama-{name}"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    return place


def bases_of(model: Path, hardware: str, *overrides: str) -> dict[str, PlannedRun | str]:
    """Return the variants of the base of a run with this model, whose folder needs no weights."""
    keys = [f"model.name={model}", "model=llama", "dataset=meta_math", "init=lora_one", "init.iters=64"]
    keys += ["dataset.accuracy_examples=0", "model.real_batch_size=64", "wandb.mode=disabled"]
    run = compose([*keys, *overrides])
    skeleton, adaptation = load_skeleton(run.model.name), adaptation_of(run, Path("no run"))
    layers, trainable = adaptation.layers(skeleton, run.init), adaptation.trainable_parameters(skeleton)
    return planned_bases(run, skeleton, layers, trainable, EXAMPLES, read_hardware(hardware))


def rows(models: dict[str, dict[str, PlannedRun]], chosen: Sequence[str]) -> Iterator[list[str]]:
    """Yield the header, then a row for each model, number of processes and base."""
    modes = modes_of(next(iter(models.values()))[chosen[0]])
    inits = [f"init {mode}" for mode in modes]
    yield ["model", "processes", "base", "training", *inits, "sent/step", "sent once", "step", "init", "run"]
    for name, bases in models.items():
        for processes in PROCESSES:
            for base in chosen:
                if processes > 1 or not base.startswith("sharded"):
                    yield [name, str(processes), *row(base, bases[base], processes, modes, ())[:-1]]


def smallest_rows(models: dict[str, dict[str, PlannedRun]], chosen: Sequence[str]) -> Iterator[list[str]]:
    """Yield the header, then the smallest number of devices for each model, base and ``init.memory``."""
    modes = ("auto", "low")
    yield ["model", "base", *(f"devices, init.memory={mode}" for mode in modes)]
    for name, bases in models.items():
        for base in chosen:
            run = bases[base].run
            runs = (replace(run, init=replace(run.init, memory=mode)) for mode in modes)
            yield [name, base, *(smallest(replace(bases[base], run=changed), ()) for changed in runs)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hardware", default="h100", help="as plan.hardware (%(default)s)")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--bases", nargs="+", default=list(BASES), help='such as "sharded by 8, bf16" (%(default)s)')
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        models = {name: bases_of(write_config(Path(folder), name), chosen.hardware) for name in chosen.models}
        tables = (list(make(models, chosen.bases)) for make in (rows, smallest_rows))
        print(*map(markdown, tables), sep="\n\n")


if __name__ == "__main__":
    main()
