"""Training examples of large data sets: read and searched once, then memory-mapped from the cache."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lora_one import datasets
from lora_one.data import contamination
from lora_one.data.contamination import Search
from lora_one.data.mapped import Parts, kept, values_at
from lora_one.datasets import DATASETS
from lora_one.datasets.settings import DatasetConfig
from lora_one.files import fingerprint
from lora_one.types import Example

MANY = 100_000  # examples; up to this number they are Python objects, of about 1 kB each
TOGETHER = 4096  # examples that are Python objects at a time
SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "response": pa.string(),
        "gold": pa.string(),
        "id": pa.string(),
        "texts": pa.list_(pa.string()),
        "label": pa.int64(),
        "messages": pa.list_(pa.list_(pa.string())),
    }
)
"""The fields of an Example; empty tuples are null."""

ENCODED = [name for name in SCHEMA.names if name not in ("gold", "id")]  # what an encoding can read

# settings that are applied to the examples after they were read
APPLIED_LATER = {"path", "cache", "shuffle_seed", "max_tokens", "max_train_samples", "max_eval_samples"}
APPLIED_LATER |= {"chat_template", "train_on_inputs", "accuracy_examples", "max_new_tokens"}


class StoredExamples(Sequence[Example]):
    """Examples of a memory-mapped table, in the order of ``places``.

    columns: those of SCHEMA.  content: sha256 of all fields that an encoding can read.  places: row of each example.
    A slice is a view; its step must be positive. Iteration reads TOGETHER examples at a time.
    """

    def __init__(self, columns: pa.Table, content: str, places: Tensor | None = None):
        self.columns = columns
        self._content = content
        self.places = torch.arange(columns.num_rows) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int | slice) -> "Example | StoredExamples":
        if isinstance(index, slice):
            return StoredExamples(self.columns, self._content, self.places[index])
        return self._read([int(self.places[range(len(self))[index]])])[0]

    def __iter__(self) -> Iterator[Example]:
        for places in self.places.split(TOGETHER):
            yield from self._read(places.tolist())

    def at(self, places: Tensor) -> "StoredExamples":
        """Return the examples at some places of this sequence, in that order."""
        return StoredExamples(self.columns, self._content, self.places[places])

    @property
    def content(self) -> str:
        """Return the sha256 of the examples, in order."""
        return hashlib.sha256(self._content.encode() + self.places.numpy().tobytes()).hexdigest()

    def _read(self, places: Sequence[int]) -> list[Example]:
        values = [values_at(self.columns.column(name), places) for name in SCHEMA.names]
        return [
            Example(prompt, response, gold, id, tuple(texts or ()), label, tuple(map(tuple, messages or ())))
            for prompt, response, gold, id, texts, label, messages in zip(*values, strict=True)
        ]


def chosen(examples: Sequence[Example], places: Tensor) -> Sequence[Example]:
    """Return the examples at some places, in that order. places: int64, one-dimensional."""
    return examples.at(places) if isinstance(examples, StoredExamples) else [examples[i] for i in places.tolist()]


@dataclasses.dataclass(frozen=True)
class Found:
    """The training examples of a data set without an evaluation's questions.

    rows: number before the search.  contaminated: number of examples removed for each evaluation.
    """

    examples: Sequence[Example]
    rows: int
    contaminated: dict[str, int]


def training_examples(config: DatasetConfig) -> Found:
    """Return the training examples of a data set, without rows that contain an evaluation's questions.

    More than MANY examples are written to ``config.cache`` and memory-mapped. Later runs with the same files, questions
    and code read nothing else; the rows of the hub are read in each run, because their version is not known.
    """
    search = Search(config.decontaminate)
    file = (
        None if config.cache is None else Path(config.cache).expanduser() / f"examples-{key_of(config, search)}.arrow"
    )
    versioned = config.path is not None or DATASETS[config.name].generated
    if file is None or not (versioned and file.exists()):
        rows = iter(DATASETS[config.name].train(config))
        first = list(rows if file is None else islice(rows, MANY + 1))
        if file is None or len(first) <= MANY:
            examples = list(search.clean(first))
            search.report()
            return Found(examples, search.rows, search.removed)
        del first
    table = kept(file, f"data: training examples of {config.name} read", lambda: parts(config, search), valid=versioned)
    search.rows, search.removed = table.facts["rows"], table.facts["removed"]
    search.report()
    return Found(StoredExamples(table.columns, table.facts["content"]), search.rows, search.removed)


def parts(config: DatasetConfig, search: Search) -> Parts:
    """Return the table of the training examples, read in parts."""
    facts: dict[str, Any] = {}

    def batches() -> Iterator[pa.RecordBatch]:
        content, clean = hashlib.sha256(), search.clean(DATASETS[config.name].train(config))
        while part := list(islice(clean, TOGETHER)):
            batch = pa.record_batch(list(map(list, zip(*map(cells, part), strict=True))), SCHEMA)
            content.update(batch.select(ENCODED).serialize())
            yield batch
        facts.update(rows=search.rows, removed=search.removed, content=content.hexdigest())

    return Parts(batches(), facts)


def cells(example: Example) -> list[Any]:
    """Return the fields of an example in the order of SCHEMA; an empty tuple becomes null."""
    return [None if (value := getattr(example, name)) == () else value for name in SCHEMA.names]


def key_of(config: DatasetConfig, search: Search) -> str:
    """Return the hash of everything that determines the training examples: files, settings, questions and code."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in APPLIED_LATER}
    code = [Path(__file__), Path(contamination.__file__), *sorted(Path(datasets.__file__).parent.glob("*.py"))]
    key = {
        "settings": settings,
        "data": config.path and fingerprint(Path(config.path).expanduser(), nested=DATASETS[config.name].nested),
        "questions": search.content,
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in code],
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
