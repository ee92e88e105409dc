"""Measure the cost of a data set before training: encoding, the cache of encoded sets, the search for questions.

    python benchmarks/bench_data.py --json bench_data.json --markdown

Generated problems, or any data set with --dataset and --data_path. Each case runs in a separate process, so that its
memory can be measured after a pass over all examples; the table shows the repeat with the fewest CPU seconds. The
script stops if the cases give different examples.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import psutil
from common import Clock, write_result

from lora_one.data import encoded_cache
from lora_one.data.contamination import Questions
from lora_one.data.encode import Encoder
from lora_one.datasets import DATASETS
from lora_one.datasets.arithmetic import FAMILIES
from lora_one.datasets.questions import questions_of
from lora_one.models import load_tokenizer

CASES = ("lists", "packed, nothing kept yet", "kept before")
FIGURES = {
    "examples": ("examples", "{:,}"),
    "tokens": ("tokens", "{:,}"),
    "seconds": ("seconds", "{:.2f}"),
    "cpu_seconds": ("CPU seconds", "{:.2f}"),
    "held_mib": ("memory held (MiB)", "{:.0f}"),
}


def examples_of(chosen: argparse.Namespace) -> list[Any]:
    """Load the training examples of the data set."""
    config = SimpleNamespace(
        path=chosen.data_path,
        families=list(FAMILIES),
        train_size=chosen.examples,
        validation_size=0,
        data_seed=0,
        rows=chosen.examples,
    )
    return list(DATASETS[chosen.dataset].train(config))


def measure(case: str, chosen: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Measure one case in this process; return its row."""
    process = psutil.Process()
    examples = examples_of(chosen)
    if case == "contamination":
        before, clock = process.memory_info().rss, Clock()
        questions = Questions(list(questions_of(chosen.decontaminate)))
        held = sum(questions.occur_in(f"{example.prompt}\n{example.response}") for example in examples)
        name, tokens, content = f"{held} rows with a question among {questions.count}", None, None
    else:
        tokenizer = load_tokenizer(chosen.model)
        before, clock = process.memory_info().rss, Clock()

        def encoding(part: Sequence[Any]) -> Any:
            return Encoder(tokenizer).encode(part, chosen.max_length)

        encoded_cache.SMALL = 0
        store = encoded_cache.EncodedCache(folder, tokenizer, {"max_length": chosen.max_length})
        encoded, _ = encoding(examples) if case == "lists" else store.encoded(encoding, examples)
        name = case
    clock.stop()
    if case != "contamination":
        total = hashlib.sha256()
        for example in encoded:
            total.update(repr(example).encode())
        tokens, content = sum(len(example.input_ids) for example in encoded), total.hexdigest()
    held_mib = (process.memory_info().rss - before) / 2**20
    row = {"name": name, "examples": len(examples), "tokens": tokens, "seconds": clock.seconds}
    return row | {"cpu_seconds": clock.cpu_seconds, "held_mib": held_mib, "content": content}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="arithmetic", help="name of a data set in conf/dataset (%(default)s)")
    parser.add_argument("--data_path", help="local file or folder of the data set")
    parser.add_argument("--examples", type=int, default=20_000, help="number of generated problems (%(default)s)")
    parser.add_argument("--model", default="bundled/tiny", help="model whose tokenizer is used (%(default)s)")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--decontaminate", help="evaluation whose questions are searched, as in dataset.decontaminate")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="print the table and the ratios as Markdown at the end")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.set_defaults(device="cpu")
    chosen = parser.parse_args(arguments)
    if chosen.case:
        print(json.dumps(measure(chosen.case, chosen, chosen.folder)))
        return
    given = list(sys.argv[1:] if arguments is None else arguments)
    turns: dict[str, list[dict[str, Any]]] = {}
    for _ in range(chosen.repeats):
        with TemporaryDirectory() as folder:
            for case in (*CASES, *(["contamination"] if chosen.decontaminate else [])):
                command = [sys.executable, __file__, *given, f"--case={case}", f"--folder={folder}"]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                row = json.loads(out.splitlines()[-1])
                turns.setdefault(case, []).append(row)
                print(f"{case}: {row['cpu_seconds']:.2f} CPU seconds", flush=True)
    contents = {row.pop("content") for rows in turns.values() for row in rows} - {None}
    assert len(contents) == 1, "the cases give different examples"
    rows = [min(found, key=lambda row: row["cpu_seconds"]) for found in turns.values()]
    lists, cold, warm = rows[:3]
    ratios = {
        "kept before / lists, CPU seconds": warm["cpu_seconds"] / lists["cpu_seconds"],
        "packed / lists, CPU seconds": cold["cpu_seconds"] / lists["cpu_seconds"],
        "kept before / lists, memory held": warm["held_mib"] / lists["held_mib"],
    }
    names = ("dataset", "data_path", "examples", "model", "max_length", "decontaminate", "repeats")
    settings = {name: getattr(chosen, name) for name in names}
    write_result(chosen, {"settings": settings, "rows": rows, "ratios": ratios}, FIGURES)


if __name__ == "__main__":
    main()
