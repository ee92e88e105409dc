"""How the commands of a message are written."""

import sys
from pathlib import Path

import pytest

from lora_one import invocation
from lora_one.invocation import command_name, other_command


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("run_exp.py", "python run_exp.py"),
        ("my folder/run_exp.py", "python 'my folder/run_exp.py'"),
        ("/x/lora_one/__main__.py", "python -m lora_one"),
        ("/usr/bin/lora-one", "lora-one"),
    ],
)
def test_command_name(program, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    assert command_name() == name


def test_a_script_is_named_so_that_the_command_runs_from_here(tmp_path, monkeypatch):
    """By its path in the checkout, from another folder by its whole path, without a checkout by its command."""
    root = Path(invocation.__file__).resolve().parents[1]
    monkeypatch.setattr(sys, "argv", ["run_exp.py"])
    monkeypatch.chdir(root)
    assert other_command("scripts/merge.py", "lora-one-merge") == "python scripts/merge.py"
    monkeypatch.chdir(tmp_path)
    assert other_command("scripts/merge.py", "lora-one-merge") == f"python {root / 'scripts/merge.py'}"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lora-one"])
    assert other_command("scripts/merge.py", "lora-one-merge") == "lora-one-merge"


def test_a_mistake_in_the_options_is_one_line(capsys):
    parser = invocation.Parser(prog="mine")
    parser.add_argument("--size", type=int)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--size=x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: argument --size: invalid int value: 'x'; mine --help lists the options\n"
