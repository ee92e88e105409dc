"""scripts/docstring_lists.py and scripts/check_site.py, which `make docs` uses in an environment of its own."""

import doctest
import importlib.util
import subprocess
import sys
import types

import pytest

from tests.helpers.paths import ROOT


def load(name, monkeypatch):
    """Import a script; griffe, which only the environment of the documents has, is replaced by empty classes."""
    classes = {name: type(name, (), {}) for name in ("Attribute", "Class", "Docstring", "Extension", "Function")}
    monkeypatch.setitem(sys.modules, "griffe", types.SimpleNamespace(**classes))
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["docstring_lists", "check_site"])
def test_examples_of_the_scripts(name, monkeypatch):
    done = doctest.testmod(load(name, monkeypatch))
    assert done.attempted and not done.failed


@pytest.mark.parametrize(
    ("page", "code"),
    [
        ('<link rel="stylesheet" href="a.css"><a href="https://example.org">read</a>', 0),
        ('<link href="https://fonts.example.org/a.css" rel="stylesheet">', 1),
        ('<img alt="" src="//example.org/a.png">', 1),
        (None, 1),
    ],
)
def test_a_site_that_loads_from_the_network_is_refused(page, code, tmp_path):
    if page is not None:
        (tmp_path / "index.html").write_text(page)
    command = [sys.executable, "scripts/check_site.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and bool(done.stderr) == bool(code)
