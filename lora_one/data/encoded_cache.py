"""Cache of encoded large data sets: packed in a few tensors, with a key of everything that determines them."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_one.data.encode import Encoded, EncodingCounts
from lora_one.distributed import Processes
from lora_one.types import Example

SMALL = 4096  # examples; up to this number they are encoded each time, which takes a second or two
TOGETHER = 4096  # examples that are in memory as lists of integers at a time
UNREAD = 90 * 86400  # seconds after which an entry that was not read is deleted
Tensors = dict[str, Tensor]
Encode = Callable[[Sequence[Example]], tuple[list[Encoded], EncodingCounts]]


class Packed(Sequence[Encoded]):
    """Encoded examples in one int32 tensor per field: 4 bytes per integer, whereas a list needs 8 to 36.

    tensors: for each field of the examples, its integers, concatenated, and the end of each example
    (``<field>.ends``); without ends, the field has one integer per example.
    """

    def __init__(self, tensors: Tensors):
        self.tensors = tensors
        self.fields = [name for name in tensors if not name.endswith(".ends")]

    def __len__(self) -> int:
        return len(self.tensors["input_ids.ends"]) if self.tensors else 0

    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        place = range(len(self))[index]
        if isinstance(place, range):
            return [self[one] for one in place]
        return Encoded(**{name: self._value(name, place) for name in self.fields})

    def _value(self, name: str, index: int) -> list[int] | int:
        values, ends = self.tensors[name], self.tensors.get(f"{name}.ends")
        if ends is None:
            return int(values[index])
        return values[int(ends[index - 1]) if index else 0 : int(ends[index])].tolist()


def packed(encode: Encode, examples: Sequence[Example]) -> Tensors:
    """Encode examples; return the tensors of ``Packed``, and ``counts`` with the fields of EncodingCounts."""
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(examples), TOGETHER):
        encoded, counted = encode(examples[start : start + TOGETHER])
        found.setdefault("counts", []).append(torch.tensor([dataclasses.astuple(counted)]))
        for field in dataclasses.fields(Encoded):
            rows = [getattr(example, field.name) for example in encoded]
            if not rows or rows[0] is None:
                continue
            if isinstance(rows[0], list):
                found.setdefault(f"{field.name}.ends", []).append(torch.tensor([len(row) for row in rows]))
                rows = list(chain.from_iterable(rows))
            found.setdefault(field.name, []).append(torch.tensor(rows, dtype=torch.int32))
    tensors = {name: torch.cat(parts) for name, parts in found.items()}
    ends = {name: sizes.cumsum(0) for name, sizes in tensors.items() if name.endswith(".ends")}
    return tensors | ends | {"counts": tensors["counts"].sum(0)}


@dataclasses.dataclass(frozen=True)
class EncodedCache:
    """Cache of encodings and lengths of large sets in ``folder`` (None: no cache).

    The key of an entry contains tokenizer, examples, code, versions, and ``settings``: everything else that determines
    an encoding.
    With several processes, the first one computes a missing entry; the others wait and read it, or compute it
    themselves if they cannot read it. Entries are written atomically, so several runs may share the folder. A broken
    entry is computed again; if the folder cannot be written, a note is printed and the run continues.
    """

    folder: str | None
    tokenizer: Any
    settings: dict[str, Any]

    def encoded(self, encode: Encode, examples: Sequence[Example]) -> tuple[Sequence[Encoded], EncodingCounts]:
        """Return ``encode(examples)``; if they are many, packed and cached."""
        if len(examples) <= SMALL:
            return encode(examples)
        tensors = dict(self._once("encoded", examples, lambda: packed(encode, examples)))
        counts = EncodingCounts(*tensors.pop("counts").tolist())
        return Packed(tensors), counts

    def measured(self, sizes: Callable[[Sequence[Example]], list[int]], examples: Sequence[Example]) -> list[int]:
        """Return ``sizes(examples)``, one number for each; if they are many, cached."""
        if len(examples) <= SMALL:
            return sizes(examples)

        def find() -> Tensors:
            starts = range(0, len(examples), TOGETHER)
            return {"sizes": torch.cat([torch.tensor(sizes(examples[start : start + TOGETHER])) for start in starts])}

        return self._once("measured", examples, find)["sizes"].tolist()

    @cached_property
    def key(self) -> dict[str, Any]:
        code = (Path(__file__), *(Path(__file__).with_name(name) for name in ("encode.py", "conversations.py")))
        return self.settings | {
            "tokenizer": content_of_tokenizer(self.tokenizer),
            "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in code],
            "versions": {package: version(package) for package in ("tokenizers", "transformers")},
        }

    def _once(self, what: str, examples: Sequence[Example], find: Callable[[], Tensors]) -> Tensors:
        if self.folder is None or self.key["tokenizer"] is None:
            return find()
        key = json.dumps(self.key | {"what": what, "examples": content_of(examples)}, sort_keys=True)
        file = Path(self.folder).expanduser() / f"{what}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        processes, message = Processes.current(), f"data: {len(examples)} examples {what}"
        found = read(file)
        try:
            if processes.rank == 0 and found is None:
                found = found_and_written(file, find, message)
            elif processes.rank == 0:
                print(f"{message}, from {file}", flush=True)
        finally:  # also if the first process fails: the others must not wait forever
            processes.meet()
        found = read(file) if found is None else found
        return find() if found is None else found


def found_and_written(file: Path, find: Callable[[], Tensors], message: str) -> Tensors:
    """Compute an entry and write it to the cache; print why, and a note if it cannot be written."""
    damaged = f" ({file} is damaged)" * file.exists()
    print(f"{message} and kept in {file.parent}{damaged}", flush=True)
    found = find()
    try:
        write(file, found)
    except (OSError, SafetensorError) as error:
        print(
            f"note: dataset.cache={file.parent} cannot be written ({error}), so the run continues without a cache: "
            "choose a writable folder, or dataset.cache=null"
        )
    return found


def read(file: Path) -> Tensors | None:
    """Return the tensors of a file, memory-mapped, so processes share them; None: it is missing or broken."""
    try:
        with safe_open(file, "pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    with suppress(OSError):  # the file may belong to another user
        file.touch()
    return found


def write(file: Path, tensors: Tensors) -> None:
    """Write an entry atomically, and delete entries that were not read for ``UNREAD`` seconds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{uuid4().hex}")
    try:
        save_file(tensors, beside)
        beside.chmod(0o644)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    for entry in chain(file.parent.glob("encoded-*"), file.parent.glob("measured-*")):
        if time.time() - entry.stat().st_mtime > UNREAD:
            entry.unlink(missing_ok=True)


def content_of(examples: Sequence[Example]) -> str:
    """Return the sha256 of all fields of the examples that an encoding can read, in order."""
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
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
