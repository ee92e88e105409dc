"""The examples run as a user starts them, and the notebook as it is stored."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.helpers.paths import ROOT

EXAMPLES = ROOT / "examples"
BASE = ROOT / "lora_one/assets/tiny"


def run(name, folder, *arguments):
    """What the example prints, started in an empty folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def loads(adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), adapter)


def falls(line):
    first, last = line.split("loss ")[1].split(" -> ")
    return float(last.split()[0].rstrip(",")) < 0.5 * float(first)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_public(path):
    """Fewer than 60 lines, and nothing of lora_one but its public names."""
    text = path.read_text()
    assert text.count("\n") < 60
    assert "from lora_one" not in text and "import lora_one." not in text


def test_plain_loop(tmp_path):
    printed = run("plain_loop.py", tmp_path)
    assert falls(printed.splitlines()[0])
    assert float(printed.rsplit(" ", 1)[1]) < 1e-3, "the saved adapter gives the trained logits"
    assert loads(tmp_path / "plain-loop-adapter")


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl: pip install -e .[trl]")
def test_trl(tmp_path):
    printed = run("trl_sft.py", tmp_path)
    assert falls(next(line for line in printed.splitlines() if line.startswith("loss ")))
    assert loads(tmp_path / "trl-sft/adapter")


def test_own_method(tmp_path):
    lines = [line.split()[0] for line in run("own_method.py", tmp_path).splitlines()]
    assert lines == ["flat_step", "lora_one", "lora", "pissa"]


@pytest.mark.slow
@pytest.mark.long
def test_own_dataset(tmp_path):
    """The model answers questions that it was not trained on."""
    printed = run("own_dataset.py", tmp_path, "results", "wandb.mode=disabled", "dataset.cache=null")
    answers = re.findall(r"^answer (\d+), expected (\d+):", printed, re.MULTILINE)
    assert len(answers) == 3 and all(answer == expected for answer, expected in answers)


def test_outputs_of_the_notebook_are_stored_and_small():
    notebook = json.loads((EXAMPLES / "walkthrough.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert (EXAMPLES / "walkthrough.ipynb").stat().st_size < 150_000
    assert not [output for output in outputs if output["output_type"] == "error"]
    for output in outputs:
        kept = {name: value for name, value in output.get("data", {}).items() if name != "image/png"}
        printed = json.dumps(output | {"data": kept})
        assert not re.search(r"(?<![\w.:<])/[\w.-]+/[\w./-]+", printed), "no path of one machine"


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    """From its cells alone, and it prints what is stored."""
    nbclient = pytest.importorskip("nbclient", reason="the notebook needs: pip install -e .[notebook]")
    pytest.importorskip("ipykernel", reason="the notebook needs: pip install -e .[notebook]")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stored = nbformat.read(EXAMPLES / "walkthrough.ipynb", as_version=4)
    new = nbformat.read(EXAMPLES / "walkthrough.ipynb", as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nbclient.NotebookClient(new, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert kinds(stored) == kinds(new)


def kinds(notebook):
    """The kinds of the outputs, without warnings."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.output_type for output in outputs if output.get("name") != "stderr"]
