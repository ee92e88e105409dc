"""A small trial has the keys of the file, except for those in ``small``."""

import doctest
import re

import pytest
import yaml

from lora_one.errors import UsageError
from lora_one.runs import comparison_keys
from lora_one.runs.comparison_file import read_comparisons
from tests.helpers.comparisons import RATE

FILE = {
    "title": "Two methods",
    "common": ["model=llama"],
    "test": ["dataset.path=test.jsonl"],
    "test_examples": 200,
    "tuning_seeds": [9],
    "seeds": [1, 2, 3],
    "seconds_per_run": 3600,
    "grid": {RATE: [1e-4, 1e-3]},
    "own_grid": {"LoRA": {RATE: [1e-3, 1e-2]}},
    "methods": {"LoRA": ["init=lora"], "PiSSA": ["init=pissa"]},
    "evaluations": {"few": {"benchmark": "gsm8k", "options": ["--num_fewshot=8"]}, "none": {"benchmark": "gsm8k"}},
    "published": {"source": "Table 1", "values": {"few": {"LoRA": 53.4}, "none": {"LoRA": 59.3}}},
}
SMALL = {
    "common": ["model.name=tiny"],
    "seeds": [1],
    "grid": {RATE: [1e-3]},
    "evaluations": {"none": {"benchmark": "gsm8k", "options": ["--limit=8"]}},
}


def written(tmp_path, **changes):
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(FILE | changes))
    return tmp_path / "file.yaml"


def test_keys_of_small_replace_those_of_the_file(tmp_path):
    file = written(tmp_path, small=SMALL)
    (whole,), (small,) = (read_comparisons(file, small=asked).values() for asked in (False, True))
    assert whole.title == "Two methods" and small.title == "Two methods (small)"
    assert small.common == ["model=llama", "model.name=tiny"] and whole.common == ["model=llama"]
    assert small.seeds == [1] and small.test == whole.test and small.methods == whole.methods
    assert small.grid_of("LoRA") == small.grid_of("PiSSA") == {RATE: [1e-3]}, "the grid is that of every method"
    assert small.seconds_per_run is None, "the time of a run is another one"
    assert small.evaluations.keys() == small.published.values.keys() == {"none"}


def test_a_task_has_its_own_small_trial(tmp_path):
    task = {"common": ["dataset=gsm8k"], "small": {"common": ["dataset.path=few"], "test_examples": 4}}
    (small,) = read_comparisons(written(tmp_path, small=SMALL, tasks={"maths": task}), small=True).values()
    assert small.common == ["model=llama", "dataset=gsm8k", "model.name=tiny", "dataset.path=few"]
    assert small.seeds == [1] and small.test_examples == 4 and small.title == "Two methods (small): maths"


@pytest.mark.parametrize(
    ("small", "message"),
    [
        (["model.name=tiny"], r"small: small=\['model.name=tiny'\] must be a mapping of keys"),
        ({"sedes": [1]}, "small: unknown key small.sedes; did you mean small.seeds"),
        ({"seeds": []}, r"small: seeds=\[\] must be a list of different integers"),
        ({"tasks": {}}, "small: unknown key small.tasks"),
    ],
    ids=str,
)
def test_mistakes_in_small_are_found_without_asking_for_it(small, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        read_comparisons(written(tmp_path, small=small))


def test_a_file_without_small(tmp_path):
    with pytest.raises(
        UsageError, match=r"--small needs the key small, which .*file.yaml does not have: add small: \{"
    ):
        read_comparisons(written(tmp_path), small=True)


def test_doctests():
    assert doctest.testmod(comparison_keys).failed == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"not_run": ["a"]}, "not_run=['a'] must be a mapping"),
        ({"not_run": {"LoRA": "a reason"}}, "not_run.LoRA is also one of the methods"),
        ({"methods": {8: ["init=lora"]}}, "methods: the name 8 is not a text: write it in quotes"),
        ({"evaluations": {"test loss": {"benchmark": "text"}}}, "evaluations.test loss: this is the name of another"),
        ({"tasks": {"a b": {}, "a-b": {}}}, "tasks: 'a-b' has the folder 'a-b', like 'a b'"),
        ({"tasks": {1: {}}}, "tasks: the name 1 is not a text"),
        (
            {"grid": {"model.learning_rate": [0.0, 1e-3]}, "refine": 1},
            "must be above 0, because refine multiplies them",
        ),
        ({"not_run": {"CorDA": None}}, "not_run.CorDA=None must be a text: the reason"),
        ({"methods": {"": ["init=lora"]}}, "methods: a name is empty"),
        ({"overlap": True}, "overlap=True must be a text: the reason"),
        ({"unequal_budgets": " "}, "unequal_budgets=' ' must be a text: the reason"),
        ({"seconds_per_run": "12"}, "seconds_per_run='12' must be a positive number"),
        ({"grid": {"optimizer": [{"name": "adamw"}]}}, "must be a list of values, not of mappings"),
        ({"grid": {"model.order_seed": [1, 2]}}, "model.order_seed must be the same for every method"),
    ],
)
def test_names_and_rates_that_would_end_a_finished_comparison_are_refused_before(tmp_path, change, message):
    content = {
        "title": "T",
        "common": [],
        "test": [],
        "test_examples": 1,
        "tuning_seeds": [9],
        "seeds": [1],
        "grid": {"model.learning_rate": [1e-3, 1e-2]},
        "methods": {"LoRA": ["init=lora"]},
    }
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(content | change))
    with pytest.raises(UsageError, match=re.escape(message)):
        read_comparisons(tmp_path / "file.yaml")
