"""Published values are checked with the file, also those of methods that were not run."""

import dataclasses

import pytest

from lora_one.errors import UsageError
from lora_one.runs.comparison_file import Comparison, Evaluation, check_comparison
from lora_one.runs.published_values import Published, published_of
from tests.helpers.comparisons import RATE

ASKED = Comparison(
    title="Two methods",
    common=[],
    test=[],
    test_examples=8,
    tuning_seeds=[9],
    seeds=[1],
    grid={RATE: [1e-3]},
    methods={"LoRA": ["init=lora"], "PiSSA": ["init=pissa"]},
    not_run={"LoRA-Pro": "not built"},
    evaluations={"accuracy": Evaluation("gsm8k")},
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("59.3", "published='59.3' must have the keys source and values, for example {source"),
        ({"values": {}}, "published.source is missing: set published.source="),
        ({"source": "Table 1"}, "published.values is missing"),
        ({"source": "Table 1", "values": {}, "valeus": {}}, "unknown key published.valeus; did you mean"),
        ({"source": " ", "values": {}}, "published.source=' ' must name the paper and the table"),
        ({"source": "Table 1", "values": {"accuracy": 59.3}}, "must name evaluations and their methods, for example"),
        (
            {"source": "Table 1", "values": {"accuracy": {"LoRA": [59.3]}}},
            r"published.values.accuracy.LoRA=\[59.3\] must be a number or a text",
        ),
        (
            {"source": "Table 1", "values": {"accuracy": {"LoRA": None}}},
            "accuracy.LoRA=None must be a number or a text",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_entry(given, message):
    with pytest.raises(UsageError, match=message):
        published_of(given)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"acuracy": {"LoRA": 59.3}}, "acuracy is not an evaluation of this comparison; did you mean accuracy?"),
        ({"accuracy": {"LoRa": 59.3}}, "accuracy.LoRa is not a method of this comparison; did you mean LoRA?"),
        ({"accuracy": {"DoRA": 59.3}}, "add it to methods, or to not_run with the reason"),
    ],
    ids=str,
)
def test_value_without_a_column_or_a_row(values, message):
    with pytest.raises(UsageError, match=message):
        check_comparison(dataclasses.replace(ASKED, published=Published("Table 1", values)))


def test_an_evaluation_that_is_not_run_may_have_values():
    evaluations = ASKED.evaluations | {"MT-Bench": Evaluation(not_run="not built")}
    published = Published("Table 1", {"MT-Bench": {"LoRA": 5.1, "LoRA-Pro": "not found"}})
    check_comparison(dataclasses.replace(ASKED, evaluations=evaluations, published=published))


def test_several_processes_are_refused_only_for_evaluations_that_are_run():
    several = dataclasses.replace(ASKED, launcher="slurm", slurm={"tasks_per_node": 4})
    with pytest.raises(UsageError, match="which evaluations in a comparison do not support"):
        check_comparison(several)
    check_comparison(dataclasses.replace(several, evaluations={"MT-Bench": Evaluation(not_run="not built")}))


def test_methods_that_are_run_and_those_that_are_not_may_have_values():
    values = {"accuracy": {"LoRA": 59.3, "LoRA-Pro": "60.1 +- 0.2"}}
    check_comparison(dataclasses.replace(ASKED, published=published_of({"source": "Table 1", "values": values})))
