"""The first rows of a data set of the hub are streamed: what is not asked for is not read."""

import pytest

from lora_one.config.defaults import dataset_settings
from lora_one.datasets import DATASETS, sources
from lora_one.datasets.sources import each_row
from lora_one.errors import RunError, UsageError
from tests.helpers.runs import run_config


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A folder of four shards with 50 rows each stands for the hub; the shards that were opened."""
    import pandas
    from datasets.packaged_modules.parquet.parquet import Parquet

    for shard in range(4):
        rows = [{"instruction": f"Say {shard * 50 + i}", "input": "", "output": f"{i}", "more": i} for i in range(50)]
        pandas.DataFrame(rows).to_parquet(tmp_path / f"train-{shard:05d}-of-00004.parquet")
    names = []
    original = Parquet._generate_tables

    def counted(self, files, *others, **options):
        for key, table in original(self, files, *others, **options):
            names.append(key)
            yield key, table

    monkeypatch.setattr(Parquet, "_generate_tables", counted)
    original_hub = sources.from_hub
    monkeypatch.setattr(sources, "from_hub", lambda name, *others: original_hub(str(tmp_path), *others))
    return names


def test_only_the_first_rows_of_a_stream_are_read(opened):
    config = dataset_settings("alpaca", None)
    config = config.__class__(**{**vars(config), "rows": 60})
    examples = list(DATASETS["alpaca"].train(config))
    assert [example.response for example in examples] == [str(i) for i in (*range(50), *range(10))]
    assert len(opened) <= 3, "two of four shards, and the first one for the names of the columns"


def test_a_stream_names_its_columns_and_an_unreachable_one_is_one_message(opened, monkeypatch):
    with pytest.raises(UsageError, match="no column missing; its columns are instruction, input, output, more"):
        each_row(("any/where", None), None, "train", ["missing"], first=3)
    monkeypatch.undo()
    with pytest.raises(RunError, match="cannot be loaded from the hub"):
        each_row(("no/where", None), None, "train", ["a"], first=3)


def test_no_rows_are_refused():
    with pytest.raises(UsageError, match=r"dataset\.rows=0 is out of range"):
        run_config("model=tiny", "dataset=alpaca", "dataset.rows=0")
