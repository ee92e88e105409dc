"""Examples of a large set are those of the list, mapped from the cache, and read again only when something changed."""

import json

import pyarrow as pa
import pytest
import torch

from lora_one.data import encoded_cache, load_dataset, stored
from lora_one.data.encode import Encoder
from lora_one.data.encoded_cache import lengths_of
from lora_one.data.stored import SCHEMA, StoredExamples, cells, training_examples
from lora_one.initialization.probe import draw
from lora_one.types import Example
from tests.helpers.runs import run_config

QUESTION = "Ann has 3 red apples and 4 green ones and Bo takes half of them home today"
EXAMPLES = [
    Example("", "ä\n"),
    Example("a", "b", "c", "part/1", ("x", ""), 0),
    Example("d", "", messages=(("user", "d"), ("assistant", ""))),
]


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch):
    """More than twenty rows are many; seven of them are read together."""
    monkeypatch.setattr(stored, "MANY", 20)
    monkeypatch.setattr(stored, "TOGETHER", 7)
    monkeypatch.setattr(encoded_cache, "SMALL", 10)
    monkeypatch.setattr(encoded_cache, "TOGETHER", 7)


@pytest.fixture
def written(tmp_path):
    """Write 40 rows in two shards of parquet, with other responses at some places; every tenth is contaminated."""

    def write(changes=None):
        import pandas

        rows = [
            {"prompt": f"Why {i}? {QUESTION * (i % 10 == 3)}", "response": f"so {'very ' * (i % 9)}{i}\n#### {i}"}
            for i in range(40)
        ]
        for place, response in (changes or {}).items():
            rows[place]["response"] = response
        (tmp_path / "data").mkdir(exist_ok=True)
        for shard in (0, 1):
            name = tmp_path / f"data/train-{shard:05d}-of-00002.parquet"
            pandas.DataFrame(rows[shard * 20 : shard * 20 + 20]).to_parquet(name)
        (tmp_path / "test.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n")

    write()
    return write


def config(tmp_path, *changes, cache="cache"):
    options = ("dataset=json", f"dataset.path={tmp_path / 'data'}", f"dataset.decontaminate={tmp_path / 'test.jsonl'}")
    where = "null" if cache is None else tmp_path / cache
    return run_config("model=tiny", *options, f"dataset.cache={where}", *changes).dataset


@pytest.fixture
def reads(monkeypatch):
    """How often the rows were read."""
    found = []
    original = stored.parts
    monkeypatch.setattr(stored, "parts", lambda *arguments: found.append(1) or original(*arguments))
    return found


def test_an_example_is_the_same_after_it_was_stored():
    columns = pa.Table.from_batches([pa.record_batch(list(zip(*map(cells, EXAMPLES), strict=True)), SCHEMA)])
    found = StoredExamples(columns, "content")
    assert list(found) == EXAMPLES == [found[0], found[1], found[-1]]
    assert list(found[1:]) == EXAMPLES[1:] and list(found[::2]) == EXAMPLES[::2] and len(found[3:]) == 0
    turned = found.at(torch.tensor([2, 0]))
    assert list(turned) == [EXAMPLES[2], EXAMPLES[0]] and list(turned[1:]) == [EXAMPLES[0]]
    assert turned.content != found.at(torch.tensor([0, 2])).content == found[::2].content
    with pytest.raises(IndexError):
        found[3]


@pytest.mark.parametrize("changes", [(), ("dataset.shuffle_seed=1", "dataset.max_tokens=20")], ids=["order", "drawn"])
def test_a_stored_set_gives_the_examples_of_a_list(tmp_path, written, tokenizer, reads, changes, capsys):
    plain = load_dataset(config(tmp_path, *changes, cache=None), Encoder(tokenizer), 30)
    said = [line for line in capsys.readouterr().out.splitlines() if "removed" in line]
    assert isinstance(plain.train_texts, list) and plain.counts["contaminated"] == {str(tmp_path / "test.jsonl"): 4}
    for again in (False, True):
        found = load_dataset(config(tmp_path, *changes), Encoder(tokenizer), 30)
        assert isinstance(found.train_texts, StoredExamples) and len(reads) == 1, again
        assert list(found.train_texts) == plain.train_texts and list(found.validation_texts) == plain.validation_texts
        assert list(found.train) == list(plain.train) and list(found.validation) == list(plain.validation)
        assert found.counts == plain.counts and torch.equal(lengths_of(found.train), lengths_of(plain.train))
        drawn = [draw(one.train_texts, 8, 30, 3, Encoder(tokenizer)) for one in (plain, found)]
        assert drawn[0] == drawn[1]
        out = capsys.readouterr().out
        assert [line for line in out.splitlines() if "removed" in line] == said
        assert (f"from {tmp_path / 'cache'}" in out) is again


def test_few_rows_are_a_list(tmp_path, written, reads):
    stored.MANY = 40
    assert isinstance(training_examples(config(tmp_path)).examples, list)
    assert not reads and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ({}, False),
        ({"rows": {5: "otherwise"}}, True),
        ({"question": "Why does the sky look blue at noon here?"}, True),
        ({"options": ("dataset.answer=response",)}, True),
        ({"options": ("dataset.shuffle_seed=3", "dataset.max_tokens=9", "dataset.max_train_samples=4")}, False),
    ],
    ids=["nothing", "rows", "questions", "columns", "applied later"],
)
def test_rows_are_read_again_if_what_determines_them_has_changed(tmp_path, written, reads, change, anew):
    first = training_examples(config(tmp_path))
    if "rows" in change:
        written(change["rows"])
    if "question" in change:
        (tmp_path / "test.jsonl").write_text(json.dumps({"question": change["question"]}) + "\n")
    options = change.get("options", ())
    found = training_examples(config(tmp_path, *options))
    assert len(reads) == 1 + anew
    assert list(found.examples) == training_examples(config(tmp_path, *options, cache=None)).examples
    same_texts = [e.response for e in found.examples] == [e.response for e in first.examples]
    assert (found.examples.content == first.examples.content) is same_texts, "the key of the encodings"


def test_an_entry_that_cannot_be_used_is_read_from_the_files(tmp_path, written, reads, capsys):
    whole = list(training_examples(config(tmp_path)).examples)
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2])
    assert list(training_examples(config(tmp_path)).examples) == whole and len(reads) == 2
    assert "is damaged" in capsys.readouterr().out
    (tmp_path / "no folder").write_text("")
    assert list(training_examples(config(tmp_path, cache="no folder")).examples) == whole
    assert f"dataset.cache={tmp_path / 'no folder'} cannot be written" in capsys.readouterr().out
