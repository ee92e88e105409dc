"""vLLM is started, awaited and stopped with its children; a small program stands in for it."""

import json
import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path
from unittest import mock
from urllib.request import urlopen

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_one.adaptation.checkpoints import save_adapter
from lora_one.errors import RunError, UsageError
from lora_one.evaluation import command
from lora_one.evaluation.engines import serving
from lora_one.evaluation.engines.serving import Patience, find_vllm, merged_for_serving, served
from lora_one.evaluation.options import EvaluationOptions
from lora_one.interruption import Interrupted
from tests.helpers.models import folder_of, random_llama, random_roberta, random_t5
from tests.helpers.paths import ROOT

QUICK = Patience(start=20, end=0.5, report=0.2, poll=0.02)
CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
FAKE = """#!{python}
import http.server, json, os, signal, subprocess, sys, time

behaviour, place = {behaviour!r}, {place!r}
pids = [os.getpid()]
if behaviour == "child":
    pids.append(subprocess.Popen([sys.executable, "-c", {child!r}]).pid)
with open(place, "w") as file:
    json.dump({{"pids": pids, "arguments": sys.argv[1:], "variables": dict(os.environ)}}, file)
if behaviour == "ignores SIGTERM":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("INFO 11-27 19:00:00 [api_server.py:1] starting", flush=True)
if behaviour == "dies":
    print("(EngineCore pid=7) ERROR 11-27 19:00:00 [core.py:1] Traceback (most recent call last):")
    print("(EngineCore pid=7) ERROR 11-27 19:00:00 [core.py:1] ValueError: the model has no weights")
    print("(APIServer pid=6) RuntimeError: Engine core initialization failed")
    print("a last line that says nothing")
    sys.exit(3)
if behaviour == "never ready":
    time.sleep(600)


class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        Handler.asked += 1
        self.send_response(503 if Handler.asked < 3 else 200)
        self.end_headers()

    def log_message(self, *_):
        pass


time.sleep(0.3)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path):
    """A function that makes a program with this behaviour; ``started()`` returns what it noted about itself."""

    class Program:
        def __init__(self, behaviour):
            self.note = tmp_path / "started.json"
            self.path = tmp_path / "vllm"
            values = {"behaviour": behaviour, "place": str(self.note), "child": CHILD, "python": sys.executable}
            self.path.write_text(FAKE.format(**values))
            self.path.chmod(0o755)

        def started(self):
            return json.loads(self.note.read_text())

    return Program


def running(pids):
    """Those of the processes that run; one that has ended but was not awaited by its parent does not."""
    found = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return [process.pid for process in found if process.status() != psutil.STATUS_ZOMBIE]


def serve(program, tmp_path, **more):
    return served("bundled/tiny", program.path, tmp_path / "logs/vllm.log", dtype="fp32", patience=QUICK, **more)


def test_the_block_begins_when_the_server_is_ready_and_stops_it(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("RANK", "0")
    program = fake("ready after a while")
    with serve(program, tmp_path, max_model_len=512, options=["--seed", "1"]) as url:
        assert urlopen(f"{url}/health").status == 200
        assert running(program.started()["pids"])
    assert not running(program.started()["pids"])
    arguments, variables = program.started()["arguments"], program.started()["variables"]
    assert arguments[0] == "serve" and arguments[-2:] == ["--seed", "1"]
    pairs = dict(pairwise(arguments))
    assert Path(arguments[1]).samefile(ROOT / "lora_one/assets/tiny") and "--max-model-len=512" in arguments
    assert (pairs["--dtype"], pairs["--generation-config"]) == ("float32", "vllm")
    assert url == f"http://127.0.0.1:{pairs['--port']}"
    assert not {"PYTHONPATH", "RANK"} & set(variables) and variables["VLLM_NO_USAGE_STATS"] == "1"
    assert "starting" in (tmp_path / "logs/vllm.log").read_text()
    shown = capsys.readouterr().err
    assert "vLLM is starting; its output is in" in shown and "vLLM is ready after" in shown


def test_an_early_end_is_one_message_with_the_errors_and_the_path_of_the_output(fake, tmp_path):
    with pytest.raises(RunError) as error, serve(fake("dies"), tmp_path):
        pytest.fail("the block must not begin")
    message = str(error.value)
    assert "exit code 3" in message and str(tmp_path / "logs/vllm.log") in message
    assert ": ValueError: the model has no weights | RuntimeError: Engine core initialization failed (" in message


def test_a_server_that_is_never_ready_is_stopped(fake, tmp_path, capsys):
    program = fake("never ready")
    patience = Patience(start=2, end=0.5, report=0.2, poll=0.02)
    with (
        pytest.raises(RunError, match=r"not ready after 0:02.*: INFO .* starting|not ready after 0:02.*: .*starting"),
        served("bundled/tiny", program.path, tmp_path / "vllm.log", dtype="fp32", patience=patience),
    ):
        pytest.fail("the block must not begin")
    assert not running(program.started()["pids"])
    assert "vLLM is starting: 0:01 elapsed" in capsys.readouterr().err


@pytest.mark.parametrize("behaviour", ["ready after a while", "ignores SIGTERM", "child"])
@pytest.mark.parametrize("end", ["normal", "error", "signal"])
def test_no_process_is_left_however_the_block_ends(fake, tmp_path, behaviour, end):
    program = fake(behaviour)
    expected = {"error": ZeroDivisionError, "signal": Interrupted}
    began = None
    try:
        with serve(program, tmp_path):
            began = time.monotonic()
            assert len(running(program.started()["pids"])) == (2 if behaviour == "child" else 1)
            if end == "error":
                raise ZeroDivisionError
            if end == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
    except expected.get(end, ()):
        pass
    else:
        assert end == "normal"
    assert not running(program.started()["pids"])
    assert time.monotonic() - began < 5


def test_a_server_that_cannot_be_started_is_one_message(tmp_path):
    broken = tmp_path / "vllm"
    broken.write_text("#!/nowhere/python\n")
    broken.chmod(0o755)
    with pytest.raises(RunError, match="could not be started"), served("a/b", broken, tmp_path / "log", dtype="fp32"):
        pytest.fail("the block must not begin")


def test_an_error_of_the_block_is_not_taken_for_one_of_the_start(fake, tmp_path):
    with pytest.raises(FileNotFoundError), serve(fake("ready after a while"), tmp_path):
        raise FileNotFoundError("of the block")


def test_nothing_on_a_free_port_is_not_ready():
    assert not serving.healthy(serving.free_port())


def test_auto_is_the_dtype_of_the_checkpoint(tmp_path, tokenizer):
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        folder = folder_of(random_llama(len(tokenizer)).to(dtype), tokenizer, tmp_path / name)
        assert serving.stored_dtype(str(folder)) == name


def test_only_a_cpu_runs_without_compiled_graphs(tmp_path):
    on_cpu, on_gpu = (serving.serve_command(tmp_path, "m", 1, "bf16", None, gpu=gpu) for gpu in (False, True))
    assert set(on_cpu) - set(on_gpu) == {"--enforce-eager"} and "--max-model-len=-1" in on_gpu


def test_vllm_is_the_given_one_or_that_on_path_or_that_of_the_script(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    made = tmp_path / "data/lora-one/vllm"
    with pytest.raises(UsageError, match=r"does not exist: make it with bash scripts/serve.sh"):
        find_vllm(None)
    programs = [made / "bin/vllm", tmp_path / "bin/vllm", tmp_path / "venv/bin/vllm"]
    for program in programs:
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    assert find_vllm(None) == programs[1]
    programs[1].unlink()
    with pytest.raises(UsageError, match="was not installed completely"):
        find_vllm(None)
    (made / "installed").touch()
    assert find_vllm(None) == programs[0]
    assert find_vllm(str(tmp_path / "venv")) == find_vllm(str(programs[2])) == programs[2]
    programs[2].chmod(0o644)
    with pytest.raises(UsageError, match="is not a program"):
        find_vllm(str(programs[2]))
    with pytest.raises(UsageError, match=r"--vllm=/nowhere"):
        find_vllm("/nowhere")


@pytest.fixture
def trained(tmp_path, tokenizer):
    """The folder of a base, the folder of an adapter of it, and the layer that the adapter changes."""
    base = folder_of(random_llama(len(tokenizer)), tokenizer, tmp_path / "base")
    model = random_llama(len(tokenizer))
    model.name_or_path = str(base)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    generator = torch.Generator().manual_seed(0)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    for factor in (layer.lora_A.default, layer.lora_B.default):
        factor.weight.data = torch.randn(factor.weight.shape, generator=generator)
    save_adapter(model, tmp_path / "adapter")
    return base, tmp_path / "adapter", layer


def test_an_adapter_is_merged_into_a_plain_model(trained, tmp_path, tokenizer):
    """The merged folder computes W x + s B A x; it is loaded by transformers alone."""
    base, adapter, layer = trained
    merged = merged_for_serving(adapter, str(base), tmp_path / "merged")
    assert sorted(AutoTokenizer.from_pretrained(merged).get_vocab()) == sorted(tokenizer.get_vocab())
    weights = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    for name, before in random_llama(len(tokenizer)).state_dict().items():
        added = 3 * layer.lora_B.default.weight @ layer.lora_A.default.weight if "layers.1.self_attn.q" in name else 0
        torch.testing.assert_close(weights[name], before + added)


def test_an_evaluation_gets_the_address_of_its_model_merged_with_its_adapter(trained, fake, tmp_path, monkeypatch):
    base, adapter, _ = trained
    monkeypatch.setattr(serving, "Patience", lambda: QUICK)
    program = fake("ready after a while")
    options = EvaluationOptions(adapter=str(adapter), engine="server", serve=True, vllm=str(program.path))
    with serving.serving(options, tmp_path / "out") as found:
        assert urlopen(f"{found.base_url}/health").status == 200
        merged = Path(found.model_name)
        assert program.started()["arguments"][1] == str(merged) and (merged / "model.safetensors").exists()
        assert (found.adapter, found.served_model, found.max_new_tokens) == (None, "model", options.max_new_tokens)
    assert not merged.exists() and [file.name for file in (tmp_path / "out").iterdir()] == ["vllm.log"]
    whole = EvaluationOptions(model_name=str(base), engine="server", serve=True, vllm=str(program.path))
    with serving.serving(whole, tmp_path / "out") as found:
        assert found.model_name == program.started()["arguments"][1] == str(base)


@pytest.mark.parametrize("serving_it", [("--serve",), ("--base_url=http://127.0.0.1:9",)])
@pytest.mark.parametrize("kind", ["ConditionalGeneration", "SequenceClassification"])
def test_other_kinds_of_models_are_refused_before_anything_is_loaded(
    kind, serving_it, fake, tmp_path, tokenizer, capsys
):
    if kind == "ConditionalGeneration":
        model = [f"--model_name={folder_of(random_t5(len(tokenizer)), tokenizer, tmp_path / 'base')}"]
    else:
        base = folder_of(random_roberta(len(tokenizer)), tokenizer, tmp_path / "base")
        config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        get_peft_model(random_roberta(len(tokenizer)), config).save_pretrained(tmp_path / "adapter")
        model = [f"--model_name={base}"]
        model += [f"--adapter={tmp_path / 'adapter'}"] if serving_it == ("--serve",) else []
    program = fake("ready after a while")
    vllm = [f"--vllm={program.path}"] if serving_it == ("--serve",) else []
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    common = [f"--data_path={data}", f"--output_dir={tmp_path / 'out'}", "--engine=server"]
    with mock.patch("lora_one.evaluation.loading.load_evaluated", side_effect=AssertionError):
        assert command.main("gsm8k", [*model, *common, *serving_it, *vllm]) == 2
    assert f"--engine=server needs a causal model, but {model[-1].partition('=')[2]} is of the type {kind}" in (
        capsys.readouterr().err
    )
    assert not program.note.exists()
