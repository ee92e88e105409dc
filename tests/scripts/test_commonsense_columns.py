"""The script that writes lm_eval's columns."""

import json
import runpy
import sys

import pytest

from tests.helpers.commonsense import ROWS
from tests.helpers.paths import ROOT


def run(monkeypatch, *arguments):
    script = ROOT / "scripts/commonsense_columns.py"
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    return stop.value.code


def test_each_set_and_split_is_a_file(tmp_path, monkeypatch, capsys):
    for name in ("piqa", "openbookqa"):
        (tmp_path / name).mkdir()
        rows = [{"instruction": ROWS[name][0], "answer": ROWS[name][1]}] * 2
        (tmp_path / name / "test.json").write_text(json.dumps(rows))
    (tmp_path / "piqa/train.json").write_text(json.dumps([{"instruction": ROWS["piqa"][0], "answer": "solution1"}]))
    assert run(monkeypatch, tmp_path, tmp_path / "out") == 0
    found = {
        file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in (tmp_path / "out").iterdir()
    }
    assert found == {
        "piqa.test.jsonl": [ROWS["piqa"][2]] * 2,
        "piqa.train.jsonl": [ROWS["piqa"][2] | {"label": 0}],
        "openbookqa.test.jsonl": [ROWS["openbookqa"][2]] * 2,
    }
    assert "piqa.test.jsonl: 2 rows" in capsys.readouterr().out


def test_another_folder_is_one_message(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tmp_path, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path} has no folder of a commonsense set (boolq, ") and "pass their" in line
