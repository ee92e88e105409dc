"""Measure memory and time of a large data set before training: first start, start with the cache, one pass in order.

    python benchmarks/bench_large_data.py --rows 1000000 --json bench_large_data.json --markdown
    python benchmarks/bench_large_data.py --rows 10000000 --fill --markdown

Generated rows of a question and an answer in parquet files. Every stage runs in a separate process; its memory is the
peak of anonymous memory (RssAnon), with the imports and without mapped files.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import Clock, write_result

SHARD = 500_000  # rows of a parquet file
PARTS = 5  # of 4,096 rows, that fill a cache by repetition
FILLING, ORDERED = "cache filled by repetition", "pass in order"
FIGURES = {
    "rows": ("rows", "{:,}"),
    "seconds": ("seconds", "{:.1f}"),
    "cpu_seconds": ("CPU seconds", "{:.1f}"),
    "anon_mib": ("memory (MiB)", "{:.0f}"),
    "disk_mib": ("on disk (MiB)", "{:.0f}"),
}
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "for",
    "is",
    "on",
    "that",
    "by",
    "this",
    "with",
    "you",
    "it",
    "not",
    "or",
    "be",
    "are",
    "from",
    "at",
    "as",
    "your",
    "all",
    "have",
    "new",
    "more",
]


def rows_of(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield questions of 8 words and a number, and answers of 3 words, which end in that number."""
    rng = random.Random(seed)
    for number in range(count):
        words = rng.choices(WORDS, k=11)
        yield f"{' '.join(words[:8])} {number}?", f"{' '.join(words[8:])} #### {number}"


def generated(folder: Path, count: int) -> None:
    """Write the training rows in equal shards, and an evaluation of 1,000 questions, of which 100 are in each shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir()
    shards = -(-count // SHARD)
    questions, answers = zip(*rows_of(-(-count // shards), 0), strict=True)
    pq.write_table(pa.table({"prompt": questions, "response": answers}), folder / "shard", row_group_size=100_000)
    for shard in range(shards):
        shutil.copy(folder / "shard", folder / f"data/train-{shard:05d}-of-{shards:05d}.parquet")
    (folder / "shard").unlink()
    known = [question for question, _ in rows_of(100, 0)]
    lines = [{"question": question} for question in [*known, *(question for question, _ in rows_of(900, -1))]]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def repeating(make: Callable[..., Any], facts: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """Return a function that makes a table from repetitions of the first PARTS parts of the one that ``make`` returns.

    facts: those of the whole table, the first of them its number of rows, from the arguments of ``make``.
    """

    def find(*arguments: Any) -> Any:
        made = make(*arguments)
        told = facts(*arguments)
        first, missing = list(islice(made.batches, PARTS)), next(iter(told.values()))

        def batches() -> Iterator[Any]:
            left = missing
            for batch in cycle(first):
                yield batch[:left]
                left -= len(batch[:left])
                if not left:
                    break
            made.facts.update(told)

        return made._replace(batches=batches())

    return find


class Peak:
    """The largest anonymous memory of this process while the block runs, in MiB."""

    def __enter__(self) -> "Peak":
        self.largest = anonymous_mib()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.largest = max(self.largest, anonymous_mib())

    def watch(self) -> None:
        while not self.over.wait(0.05):
            self.largest = max(self.largest, anonymous_mib())


def anonymous_mib() -> float:
    """Return the anonymous memory of this process, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 2**10


def work(stage: str, folder: Path) -> dict[str, Any]:
    """Do one stage in this process; return its row."""
    import pyarrow.parquet

    from lora_one.config.defaults import dataset_settings
    from lora_one.data import load_dataset
    from lora_one.data.encode import Encoder
    from lora_one.data.encoded_cache import lengths_of
    from lora_one.data.order import MicroBatches
    from lora_one.distributed import Processes
    from lora_one.files import fingerprint
    from lora_one.initialization.probe import draw
    from lora_one.models import load_tokenizer

    config = dataset_settings("json", str(folder / "data"))
    changes = {
        "cache": str(folder / "cache"),
        "validation_size": 1000,
        "decontaminate": str(folder / "evaluation.jsonl"),
    }
    changes["shuffle_seed"] = 0 if "shuffled" in stage else None
    config = config.__class__(**{**vars(config), **changes})
    if stage == FILLING:
        from lora_one.data import encoded_cache, stored

        rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in (folder / "data").iterdir())
        stored.parts = repeating(
            stored.parts, lambda _, search: {"rows": rows, "removed": search.removed, "content": "repeated"}
        )
        encoded_cache.packed = repeating(encoded_cache.packed, lambda _, examples: {"whole": len(examples)})
    encoder = Encoder(load_tokenizer("bundled/tiny"))
    with Peak() as peak:
        clock = Clock()
        if stage != ORDERED:
            fingerprint(folder / "data")  # as a run does for the name of its folder
        splits = load_dataset(config, encoder, 512)
        if stage != ORDERED:
            draw(splits.train_texts, 64, 512, 0, encoder)
        else:
            clock = Clock()
            order = MicroBatches(lengths_of(splits.train), 64, 8, Processes(), seed=0)
            assert sum(map(len, order)) == len(splits.train)
            batches = ([splits.train[index] for index in batch] for batch in islice(order, 1000))
            assert sum(map(len, batches)) == min(8000, len(splits.train))
        clock.stop()
    row = {"name": stage, "rows": splits.counts["rows"], "seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds}
    return row | {"anon_mib": peak.largest, "counts": splits.counts}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000, help="number of generated rows (%(default)s)")
    parser.add_argument("--shuffled", action="store_true", help="also measure starts with dataset.shuffle_seed")
    parser.add_argument(
        "--fill", action="store_true", help="instead of a first start, fill the cache with repetitions of its beginning"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="print the table and the ratios as Markdown at the end")
    parser.add_argument("--folder", type=Path, help="folder for the generated files (default: a temporary one)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.set_defaults(device="cpu")
    chosen = parser.parse_args(arguments)
    if chosen.stage:
        print(json.dumps(work(chosen.stage, chosen.folder)))
        return
    with TemporaryDirectory(dir=chosen.folder) as scratch:
        folder = Path(scratch)
        generated(folder, chosen.rows)
        stages = [FILLING if chosen.fill else "first start", "start with the cache", ORDERED]
        stages += ["first start, shuffled", "start with the cache, shuffled"] if chosen.shuffled else []
        rows = []
        for stage in stages:
            command = [sys.executable, __file__, f"--stage={stage}", f"--folder={folder}"]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = json.loads(out.splitlines()[-1])
            row["disk_mib"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
            rows.append(row)
            print(f"{stage}: {row['seconds']:.1f} s, {row['anon_mib']:.0f} MiB", flush=True)
    assert all(row.pop("counts") == rows[0]["counts"] for row in rows[1:]), "the stages give different examples"
    ratios = {f"start with the cache / {rows[0]['name']}, seconds": rows[1]["seconds"] / rows[0]["seconds"]}
    write_result(chosen, {"settings": {"rows": chosen.rows}, "rows": rows, "ratios": ratios}, FIGURES)


if __name__ == "__main__":
    main()
