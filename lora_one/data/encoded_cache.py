"""Cache of encoded large data sets: packed in a few columns, with a key of everything that determines them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from lora_one.data.encode import Encoded, EncodingCounts
from lora_one.data.mapped import Parts, Table, kept
from lora_one.data.stored import StoredExamples
from lora_one.types import Example

SMALL = 4096  # examples; up to this number they are encoded each time, which takes a second or two
TOGETHER = 4096  # examples that are in memory as lists of integers at a time
Encode = Callable[[Sequence[Example]], tuple[list[Encoded], EncodingCounts]]


class Packed(Sequence[Encoded]):
    """Encoded examples in one Arrow column per field: 4 bytes per integer, whereas a list needs 8 to 36.

    columns: the fields of the examples, as int32 or lists of int32.
    """

    def __init__(self, columns: pa.Table):
        self.columns = {name: columns.column(name) for name in columns.column_names}

    def __len__(self) -> int:
        return len(self.columns["input_ids"]) if self.columns else 0

    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        place = range(len(self))[index]
        if isinstance(place, range):
            return [self[one] for one in place]
        return Encoded(**{name: integers_in(column[place]) for name, column in self.columns.items()})

    @property
    def lengths(self) -> Tensor:
        """Return the number of tokens of each example, int64 (examples,)."""
        read = [self.columns[name] for name in ("input_ids", "decoder_ids") if name in self.columns]
        found = [torch.tensor(pc.list_value_length(column).to_numpy()).long() for column in read]
        return sum(found, torch.zeros(len(self), dtype=torch.int64))


def integers_in(cell: pa.Scalar) -> list[int] | int:
    """Return the integers of a list, or a single one."""
    return cell.values.to_numpy().tolist() if isinstance(cell, pa.ListScalar) else cell.as_py()


def lengths_of(examples: Sequence[Encoded]) -> Tensor:
    """Return the number of tokens of each example, int64 (examples,)."""
    return examples.lengths if isinstance(examples, Packed) else torch.tensor([one.tokens for one in examples]).long()


def packed(encode: Encode, examples: Sequence[Example]) -> Parts:
    """Encode examples in parts; return the columns of ``Packed``, and as facts the fields of EncodingCounts."""
    facts = dataclasses.asdict(EncodingCounts(0, 0, 0))

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(examples), TOGETHER):
            encoded, counted = encode(list(examples[start : start + TOGETHER]))
            for name, count in dataclasses.asdict(counted).items():
                facts[name] += count
            if encoded:
                yield batch_of(encoded)

    return Parts(batches(), facts)


def batch_of(encoded: Sequence[Encoded]) -> pa.RecordBatch:
    """Return examples as a batch with a column for each field that they have."""
    columns = {}
    for name in (field.name for field in dataclasses.fields(Encoded)):
        rows = [getattr(example, name) for example in encoded]
        if rows[0] is not None:
            kind = pa.list_(pa.int32()) if isinstance(rows[0], list) else pa.int32()
            columns[name] = pa.array(rows, kind)
    return pa.record_batch(columns)


@dataclasses.dataclass(frozen=True)
class EncodedCache:
    """Cache of encodings and lengths of large sets in ``folder`` (None: no cache).

    The key of an entry contains tokenizer, examples, code, versions, and ``settings``: everything else that determines
    an encoding.
    Entries are written atomically, so several runs may share the folder; see ``mapped.kept``.
    """

    folder: str | None
    tokenizer: Any
    settings: dict[str, Any]

    def encoded(self, encode: Encode, examples: Sequence[Example]) -> tuple[Sequence[Encoded], EncodingCounts]:
        """Return ``encode(examples)``; if they are many, packed and cached."""
        if len(examples) <= SMALL:
            return encode(list(examples))
        table = self._once("encoded", examples, lambda: packed(encode, examples))
        return Packed(table.columns), EncodingCounts(**table.facts)

    def measured(self, sizes: Callable[[Sequence[Example]], list[int]], examples: Sequence[Example]) -> Tensor:
        """Return ``sizes(examples)``, one number for each, int64; if they are many, cached."""
        if len(examples) <= SMALL:
            return torch.tensor(sizes(list(examples))).long()

        def batches() -> Iterator[pa.RecordBatch]:
            for start in range(0, len(examples), TOGETHER):
                found = sizes(list(examples[start : start + TOGETHER]))
                yield pa.record_batch({"sizes": pa.array(found, pa.int64())})

        table = self._once("measured", examples, lambda: Parts(batches(), {}))
        return torch.tensor(table.columns.column("sizes").to_numpy())

    @cached_property
    def key(self) -> dict[str, Any]:
        names = ("encode.py", "conversations.py", "chat_template.py")
        code = (Path(__file__), *(Path(__file__).with_name(name) for name in names))
        return self.settings | {
            "tokenizer": content_of_tokenizer(self.tokenizer),
            "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in code],
            "versions": {package: version(package) for package in ("tokenizers", "transformers")},
        }

    def _once(self, what: str, examples: Sequence[Example], find: Callable[[], Parts]) -> Table:
        if self.folder is None or self.key["tokenizer"] is None:
            return find().together()
        key = json.dumps(self.key | {"what": what, "examples": content_of(examples)}, sort_keys=True)
        file = Path(self.folder).expanduser() / f"{what}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.arrow"
        return kept(file, f"data: {len(examples)} examples {what}", find)


def content_of(examples: Sequence[Example]) -> str:
    """Return the sha256 of all fields of the examples that an encoding can read, in order."""
    if isinstance(examples, StoredExamples):
        return examples.content
    total = hashlib.sha256()
    for example in examples:
        total.update(
            json.dumps([example.prompt, example.response, example.texts, example.label, example.messages]).encode()
            + b"\n"
        )
    return total.hexdigest()


def content_of_tokenizer(tokenizer: Any) -> str | None:
    """Return the sha256 of a tokenizer's definition; None: it is written in Python, so its definition is unknown."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        return None
    told = json.loads(core.to_str())
    for name in ("truncation", "padding"):  # state of the last call, not part of the definition
        told.pop(name, None)
    told |= {
        "class": type(tokenizer).__name__,
        "chat": tokenizer.chat_template,
        "special": tokenizer.special_tokens_map,
    }
    for name in ("truncation_side", "model_input_names", "split_special_tokens"):
        told[name] = getattr(tokenizer, name, None)
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
