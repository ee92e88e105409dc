"""Large sets are encoded once, by one process for all, and kept under all they depend on, whole or not at all."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pyarrow as pa
import pytest
from safetensors.torch import load_file

from lora_one.data import encoded_cache, encoded_cache_for, load_dataset, mapped
from lora_one.data.encode import ClassEncoder, Encoded, Encoder, EncoderDecoderEncoder, EncodingCounts
from lora_one.data.encoded_cache import EncodedCache, Packed, lengths_of, packed
from lora_one.models import load_tokenizer
from lora_one.types import Example
from tests.helpers.paths import ROOT
from tests.helpers.runs import finish, run_config, small_run


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch):
    """More than ten examples are many, and seven are encoded together."""
    monkeypatch.setattr(encoded_cache, "SMALL", 10)
    monkeypatch.setattr(encoded_cache, "TOGETHER", 7)


@pytest.fixture
def rows(tmp_path):
    """40 rows, every fifth of them long; ``written(changes)`` writes them with other texts at some places."""
    file = tmp_path / "train.jsonl"

    def written(changes=None, name=file):
        texts = {i: "so " * (60 if i % 5 == 0 else i) + f"{i}" for i in range(40)} | (changes or {})
        name.write_text("".join(json.dumps({"prompt": f"Why {i}?", "response": texts[i]}) + "\n" for i in texts))
        return name

    written()
    return written


@pytest.fixture
def calls(monkeypatch):
    """How many examples were encoded and measured."""
    done = {"encode": 0, "sizes": 0}

    def counting(name, original):
        def count(encoder, examples, *arguments):
            done[name] += len(examples)
            return original(encoder, examples, *arguments)

        return count

    for name in done:
        monkeypatch.setattr(Encoder, name, counting(name, getattr(Encoder, name)))
    return done


def config(tmp_path, *overrides, cache="cache", file="train.jsonl"):
    where = "null" if cache is None else tmp_path / cache
    return run_config(
        "model=tiny", "dataset=json", f"dataset.path={tmp_path / file}", f"dataset.cache={where}", *overrides
    ).dataset


def entries(folder):
    return sorted(path.name.split("-")[0] for path in folder.iterdir())


def same(one, other):
    return (list(one.train), list(one.validation), one.counts, one.train_texts) == (
        list(other.train),
        list(other.validation),
        other.counts,
        other.train_texts,
    )


def test_packed_examples_are_those_of_the_lists(tokenizer):
    examples = [Example("Why?", "so " * i) for i in range(30)]
    lists, counts = Encoder(tokenizer).encode(examples, 20)
    assert counts.shortened and counts.dropped
    table = packed(lambda part: Encoder(tokenizer).encode(part, 20), examples).together()
    assert EncodingCounts(**table.facts) == counts
    found = Packed(table.columns)
    assert len(found) == len(lists) and list(found) == lists
    assert found[-1] == lists[-1] and found[3:-2:2] == lists[3:-2:2] and found[:0] == []
    with pytest.raises(IndexError):
        found[len(lists)]
    assert all(kind == pa.list_(pa.int32()) for kind in table.columns.schema.types)
    assert lengths_of(found).tolist() == lengths_of(lists).tolist() == [example.tokens for example in lists]


@pytest.mark.parametrize("kind", [Encoder, EncoderDecoderEncoder, ClassEncoder])
def test_every_kind_of_encoding_is_packed_whole_and_has_its_own_key(tokenizer, kind):
    encoder = kind(tokenizer)
    examples = [Example(f"{i}?", "so " * i, texts=("a " * i, f"b {i}"), label=i % 3) for i in range(1, 30)]
    lists, _ = encoder.encode(examples, 20)
    found = Packed(packed(lambda part: encoder.encode(part, 20), examples).together().columns)
    assert list(found) == lists and lengths_of(found).tolist() == lengths_of(lists).tolist()
    chosen = run_config("model=tiny").dataset
    kinds = (Encoder, EncoderDecoderEncoder, ClassEncoder)
    keys = [encoded_cache_for(chosen, each(tokenizer), max_length=20).key for each in kinds]
    assert keys.count(encoded_cache_for(chosen, encoder, max_length=20).key) == 1
    assert (
        encoded_cache_for(chosen, EncoderDecoderEncoder(tokenizer, start=1)).key
        != encoded_cache_for(chosen, kind(tokenizer)).key
    )


def test_a_class_is_one_integer_and_nothing_left_is_empty():
    counts = EncodingCounts(1, 0, 0)
    found = packed(lambda part: ([Encoded([1, 2], 3)] * len(part), counts), [Example("a", "b")] * 9).together()
    assert EncodingCounts(**found.facts) == EncodingCounts(2, 0, 0), "of two parts"
    assert list(Packed(found.columns)) == [Encoded([1, 2], 3)] * 9
    nothing = Packed(packed(lambda part: ([], counts), [Example("a", "b")] * 9).together().columns)
    assert not nothing and list(nothing) == [] and lengths_of(nothing).tolist() == []


def test_cached_encoding_is_read(tmp_path, rows, tokenizer, calls, capsys):
    plain = load_dataset(config(tmp_path, "dataset.max_tokens=60", cache=None), Encoder(tokenizer), 40)
    assert plain.counts["train"]["shortened"] and plain.counts["too_long"]
    calls.update(encode=0, sizes=0)
    cold = load_dataset(config(tmp_path, "dataset.max_tokens=60"), Encoder(tokenizer), 40)
    assert calls == {"encode": len(cold.train_texts) + len(cold.validation_texts), "sizes": 40}
    assert entries(tmp_path / "cache") == ["encoded", "measured"], "the validation examples are few"
    calls.update(encode=0, sizes=0)
    warm = load_dataset(config(tmp_path, "dataset.max_tokens=60"), Encoder(tokenizer), 40)
    assert calls == {"encode": len(warm.validation_texts), "sizes": 0}
    assert same(plain, cold) and same(plain, warm)
    assert capsys.readouterr().out.count(f", from {tmp_path / 'cache'}") == 2


def test_few_examples_are_not_cached(tmp_path, rows, tokenizer):
    load_dataset(config(tmp_path, "dataset.max_train_samples=10"), Encoder(tokenizer), 40)
    assert not (tmp_path / "cache").exists()


def other_tokenizer(change):
    changed = load_tokenizer("bundled/tiny")
    if change == "token":
        changed.add_tokens(["so so"])
    if change == "chat":
        changed.chat_template = "{{ messages }}"
    if change == "side":
        changed.truncation_side = "left"
    if change == "inputs":
        changed.model_input_names = ["input_ids"]
    if change == "split":
        changed.split_special_tokens = True
    if change == "cut":
        changed(["cut to two tokens"], truncation=True, max_length=2)
    return changed


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ({"changes": {3: "otherwise"}}, True),
        ({"max_length": 41}, True),
        ({"overrides": ("dataset.shuffle_seed=1",)}, True),
        ({"tokenizer": "token"}, True),
        ({"tokenizer": "chat"}, True),
        ({"tokenizer": "side"}, True),
        ({"tokenizer": "inputs"}, True),
        ({"tokenizer": "split"}, True),
        ({"tokenizer": "cut"}, False),
        ({"file": "elsewhere.jsonl"}, False),
        ({"overrides": ("dataset.accuracy_examples=2", "dataset.max_eval_samples=1")}, False),
        ({"changes": {39: "a validation example"}}, False),
    ],
    ids=str,
)
def test_cache_key_contains_exactly_what_the_encoding_depends_on(tmp_path, rows, tokenizer, change, anew):
    load_dataset(config(tmp_path), Encoder(tokenizer), 40)
    assert entries(tmp_path / "cache") == ["encoded"]
    file = change.get("file", "train.jsonl")
    rows(change.get("changes"), tmp_path / file)
    other = other_tokenizer(change["tokenizer"]) if "tokenizer" in change else tokenizer
    settings, length = change.get("overrides", ()), change.get("max_length", 40)
    found = load_dataset(config(tmp_path, *settings, file=file), Encoder(other), length)
    assert len(entries(tmp_path / "cache")) == 1 + anew
    assert same(found, load_dataset(config(tmp_path, *settings, cache=None, file=file), Encoder(other), length))


def test_code_and_versions_are_part_of_the_key(tokenizer):
    key = EncodedCache("folder", tokenizer, {"chat": False}).key
    assert key["chat"] is False and len(key["code"]) == 4 and set(key["versions"]) == {"tokenizers", "transformers"}


def test_tokenizer_without_serialisation_is_not_cached(tmp_path):
    counts = EncodingCounts(1, 0, 0)
    unknown = EncodedCache(str(tmp_path), SimpleNamespace(chat_template=None), {})
    found, _ = unknown.encoded(lambda part: ([Encoded([1], [1])] * len(part), counts), [Example("a", "b")] * 11)
    assert len(found) == 11 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["cut", "empty", "other"])
def test_damaged_entry_is_recomputed(tmp_path, rows, tokenizer, harm, capsys):
    whole = load_dataset(config(tmp_path), Encoder(tokenizer), 40)
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    file.unlink()  # the whole one stays mapped
    file.write_bytes({"cut": content[:-1], "empty": b"", "other": b"no tensors at all"}[harm])
    assert same(whole, load_dataset(config(tmp_path), Encoder(tokenizer), 40))
    assert f"{file} is damaged" in capsys.readouterr().out
    assert file.read_bytes() == content and len(list((tmp_path / "cache").iterdir())) == 1


def test_unwritable_cache_folder_prints_a_note(tmp_path, rows, tokenizer, capsys):
    (tmp_path / "cache").write_text("a file")
    found = load_dataset(config(tmp_path), Encoder(tokenizer), 40)
    assert same(found, load_dataset(config(tmp_path, cache=None), Encoder(tokenizer), 40))
    assert f"note: dataset.cache={tmp_path / 'cache'} cannot be written" in capsys.readouterr().out


def test_a_write_that_fails_leaves_nothing(tmp_path, rows, tokenizer, monkeypatch, capsys):
    def full(sink, parts):
        sink.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "write_parts", full)
    assert len(load_dataset(config(tmp_path), Encoder(tokenizer), 40).train) == 36
    assert "No space left on device" in capsys.readouterr().out and not list((tmp_path / "cache").iterdir())


def test_unused_entries_are_deleted(tmp_path, rows, tokenizer):
    load_dataset(config(tmp_path), Encoder(tokenizer), 40)
    load_dataset(config(tmp_path), Encoder(tokenizer), 41)
    first, second = sorted((tmp_path / "cache").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    mine = tmp_path / "cache" / "mine.safetensors"
    mine.write_text("somebody's own")
    long_ago = time.time() - mapped.UNREAD - 60
    for file in (first, second, mine):
        os.utime(file, (long_ago, long_ago))
    load_dataset(config(tmp_path), Encoder(tokenizer), 40)  # reads the first
    load_dataset(config(tmp_path), Encoder(tokenizer), 42)  # writes another
    assert first.exists() and not second.exists() and mine.exists()


def test_a_run_on_packed_examples_ends_with_the_same_adapter(tmp_path, monkeypatch):
    folders = []
    options = ("bundled/tiny", f"dataset.cache={tmp_path / 'cache'}")
    for name, small in (("lists", 1000), ("packed", 10)):
        monkeypatch.setattr(encoded_cache, "SMALL", small)
        folders.append(finish(small_run(tmp_path / name, *options)))
    assert entries(tmp_path / "cache") == ["encoded"]
    lists, tensors = (load_file(folder.adapter / "adapter_model.safetensors") for folder in folders)
    assert all(values.equal(tensors[name]) for name, values in lists.items())


WORK = """
import json, sys
from datetime import timedelta
from types import SimpleNamespace
from torch import distributed as dist
from lora_one.data import encoded_cache
from lora_one.data.encode import Encoded, EncodingCounts
from lora_one.types import Example

folder, rank = sys.argv[1], int(sys.argv[2])
encoded_cache.SMALL, encoded, told = 10, [], []

def encoding(part):
    encoded.append(len(part))
    if where.folder.endswith("failing") and rank == 0:
        raise ValueError("the first cannot")
    return [Encoded([len(example.response)], [1]) for example in part], EncodingCounts(len(part), 0, 0)

meeting = {"init_method": f"file://{folder}/meeting", "timeout": timedelta(seconds=60)}
dist.init_process_group("gloo", rank=rank, world_size=2, **meeting)
core = SimpleNamespace(to_str=lambda: "{}")
tokenizer = SimpleNamespace(chat_template=None, special_tokens_map={}, backend_tokenizer=core)
for name in ("kept", "kept", "failing"):
    where = encoded_cache.EncodedCache(f"{folder}/{name}", tokenizer, {})
    try:
        found, _ = where.encoded(encoding, [Example("a", "b" * i) for i in range(30)])
        told.append([[example.input_ids[0] for example in found], sum(encoded)])
    except ValueError as error:
        told.append([str(error), sum(encoded)])
    encoded.clear()
dist.destroy_process_group()
print("told", json.dumps(told))
"""


def test_one_process_encodes_for_all_and_failure_does_not_block(tmp_path):
    """Both give the same; then the first of the two fails, and the second encodes for itself."""
    commands = [[sys.executable, "-c", WORK, str(tmp_path), str(rank)] for rank in (0, 1)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for command in commands]
    outs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    first, second = (json.loads(out.rpartition("told ")[2]) for out in outs)
    values = list(range(30))
    assert first == [[values, 30], [values, 0], ["the first cannot", 30]]
    assert second == [[values, 0], [values, 0], [values, 30]]
    assert outs[0].count("data: 30 examples encoded") == 3 and "data:" not in outs[1], "the first process speaks"
