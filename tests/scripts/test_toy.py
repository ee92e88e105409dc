"""scripts/toy.py: a table with the documented columns, a figure, and one message for each mistake."""

import csv
import re
from functools import partial

import pytest

from lora_one.errors import UsageError
from tests.helpers.paths import ROOT
from tests.helpers.toys import alignment, angles, phase_portrait, relu, risk, toy

MODULES = {"t1": alignment, "t2": risk, "t3": phase_portrait, "t4": relu, "t5": angles}
PAGE = (ROOT / "docs/toy.md").read_text()


@pytest.mark.parametrize("name", ["t1", "t2", "t3", "t4"])
def test_writes_a_table_and_a_figure(name, tmp_path, monkeypatch, capsys):
    module, rows = MODULES[name], partial(MODULES[name].rows, steps=5)
    monkeypatch.setattr(module, "rows", rows)
    assert toy.main([name, "--out", str(tmp_path / "new/folder")]) == 0
    with (tmp_path / f"new/folder/{name}.csv").open() as file:
        header, *lines = csv.reader(file)
    assert tuple(header) == module.Row._fields
    assert lines == [[str(value) for value in row] for row in rows()] and len(lines) > 5
    image = (tmp_path / f"new/folder/{name}.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 20_000
    assert str(tmp_path / f"new/folder/{name}.csv") in capsys.readouterr().out


@pytest.mark.parametrize("name", MODULES)
def test_the_page_documents_every_column(name):
    """In the section of the experiment, a row of a table for each column, in the order of the file."""
    (section,) = re.findall(rf"^## {name.upper()}.*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE)
    assert tuple(column for cell in cells for column in re.findall(r"`(\w+)`", cell)) == MODULES[name].Row._fields
    assert toy.EXPERIMENTS[name] == MODULES[name].__name__.removeprefix("toys.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t6"], "t6 is not an experiment; valid: t1, t2, t3, t4, t5"),
        (["T1"], "T1 is not an experiment; did you mean t1?"),
        (["t1", "--model=x"], "--model=x is used only by t5: leave it out"),
        (["t5"], "--model is not given: pass the folder of a BERT encoder"),
        (
            ["t5", "--model=no/model", "--data=x"],
            "--model=no/model has no config.json: pass the folder of a BERT encoder",
        ),
        (["t5", "--model={}", "--data=no/data"], "--data=no/data has no train.tsv: pass the folder of MRPC"),
        (["t1", "--out={}/config.json"], "config.json cannot be written (File exists): choose another folder"),
    ],
)
def test_mistakes_name_the_way_out(arguments, message, tmp_path):
    (tmp_path / "config.json").touch()
    options = toy.parser().parse_args([argument.format(tmp_path) for argument in arguments])
    with pytest.raises(UsageError, match=re.escape(message)):
        toy.run(options)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_mistake_is_one_line(capsys):
    assert toy.main(["t6"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: t6 is not")
