"""Options of the engine that contradict each other or have no effect: one message, before anything is loaded."""

import sys

import pytest

from lora_one.evaluation import loading
from lora_one.evaluation.command import main
from lora_one.evaluation.engines import server

MODEL = ["--model_name=bundled/tiny"]
SERVER = [*MODEL, "--engine=server", "--base_url=http://127.0.0.1:1"]
WRONG = [
    ("gsm8k", [*MODEL, "--base_url=http://a"], "--base_url has no effect without --engine=server"),
    ("gsm8k", [*MODEL, "--concurrency=3"], "--concurrency has no effect without --engine=server"),
    ("gsm8k", [*MODEL, "--no_parity"], "--no_parity has no effect with --engine=transformers"),
    ("gsm8k", [*MODEL, "--engine=server"], "needs either --base_url"),
    ("gsm8k", [*SERVER, "--serve"], "and --serve exclude each other"),
    ("gsm8k", [*SERVER, "--vllm=/bin/true"], "--vllm=/bin/true has no effect without --serve"),
    ("gsm8k", [*MODEL, "--engine=server", "--serve", "--vllm=/nowhere"], "--vllm=/nowhere"),
    ("gsm8k", [*SERVER, "--concurrency=0"], "--concurrency=0 must be at least 1"),
    ("gsm8k", [*SERVER, "--request_timeout=0"], "--request_timeout=0.0 must be a positive number"),
    ("gsm8k", [*SERVER, "--adapter=."], "--adapter=. cannot be put on a model that a server has loaded"),
    ("commonsense", [*SERVER, "--data_path=."], "sampled beams (--greedy and --protocol=lm_eval do without)"),
    ("gsm8k", [*MODEL, "--engine=vllm"], "invalid choice: 'vllm'"),
    ("gsm8k", ["--rescore=x.jsonl", "--engine=server", "--base_url=http://a"], "does not exist"),
]
ADDRESSES = [
    ("127.0.0.1:8000", "--base_url=127.0.0.1:8000 is not an address"),
    ("ftp://a", "--base_url=ftp://a is not an address"),
    ("http://me:secret@a", "--base_url has more than an address"),
]


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(loading, "load_evaluated", None)
    monkeypatch.setattr(server, "served", None)


@pytest.mark.parametrize(("task", "options", "told"), WRONG)
def test_wrong_options_of_an_engine(task, options, told, tmp_path, capsys):
    with_output = [*options, f"--output_dir={tmp_path / 'out'}"]
    try:
        code = main(task, with_output)
    except SystemExit as ended:  # argparse
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and told in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("address", "told"), ADDRESSES)
def test_wrong_addresses(address, told, tmp_path, capsys):
    options = [*MODEL, "--engine=server", f"--base_url={address}", "--no_parity", f"--output_dir={tmp_path / 'out'}"]
    data = tmp_path / "test.jsonl"
    data.write_text('{"question": "3 + 4", "answer": "#### 7"}\n')
    assert main("gsm8k", [*options, f"--data_path={data}"]) == 2
    error = capsys.readouterr().err
    assert told in error and "secret" not in error


def test_a_classification_head_refuses_a_server(tmp_path, capsys, tokenizer):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path / "head"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = [f"--model_name={folder}", "--dataset=rte", "--engine=server", "--base_url=http://127.0.0.1:1"]
    assert main("glue", options) == 2
    assert "--engine=server cannot be used for a classification head" in capsys.readouterr().err


def test_the_options_are_checked_without_importing_a_client():
    """--help and mistakes are answered at once; nothing of the server engine is imported for transformers."""
    import subprocess

    code = "import lora_one.evaluation.options, lora_one.evaluation, sys; print('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
