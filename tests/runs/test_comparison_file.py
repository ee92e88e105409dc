"""A comparison is honest: chosen by validation, reported on another split, the same work for every method."""

import dataclasses

import pytest

from lora_one.errors import UsageError
from lora_one.reports import compare as table
from lora_one.runs import comparison_jobs
from lora_one.runs.comparison_file import read_comparisons
from lora_one.runs.composition import compose
from tests.helpers.paths import ROOT

SHIPPED = sorted((ROOT / "scripts/comparisons").glob("*.yaml"))


def test_wrong_comparison_file(tmp_path):
    wrong = {
        "metods: {}": "unknown key metods.*did you mean methods",
        "a: [": "is not valid YAML",
        "- a": "contains no keys",
    }
    for text, message in wrong.items():
        (tmp_path / "file.yaml").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_comparisons(tmp_path / "file.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_comparisons(tmp_path / "no.yaml")


def shipped_methods():
    return [
        (file, task, method)
        for file in SHIPPED
        for task, comparison in read_comparisons(file).items()
        for method in comparison.methods
    ]


@pytest.mark.parametrize(("file", "task", "method"), shipped_methods(), ids=lambda value: getattr(value, "stem", value))
def test_shipped_comparison_composes_and_every_method_has_the_same_work(file, task, method, tmp_path):
    """On any model and data, with the first point of the grid."""
    shipped = read_comparisons(file)[task]
    scaled = [text for text in shipped.methods[method] if text.startswith("optimizer=scaled_")]
    if scaled and not (ROOT / f"conf/{scaled[0].replace('=', '/')}.yaml").exists():
        pytest.skip(f"{scaled[0]} is not built")
    local = ["model.name=bundled/tiny", f"dataset.path={tmp_path}"]
    jobs = comparison_jobs.Jobs(dataclasses.replace(shipped, common=[*shipped.common, *local]), compose)
    assert jobs.configured(method, table.grid_points(shipped.grid_of(method))[0]).model.name == "bundled/tiny"
