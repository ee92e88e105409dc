"""A real model gives the same in vLLM as in transformers: completions of GSM8K and likelihoods of MMLU, in fp32."""

import json
import os
from contextlib import closing

import pytest
import torch

from lora_one.errors import UsageError
from lora_one.evaluation import command
from lora_one.evaluation.choices import question_of, questions_of
from lora_one.evaluation.decoding import Decoding
from lora_one.evaluation.engines import engine_class
from lora_one.evaluation.engines.serving import find_vllm, served
from lora_one.evaluation.gsm8k import test_problems as gsm8k_problems
from lora_one.evaluation.mmlu import test_questions as mmlu_questions
from lora_one.evaluation.options import EvaluationOptions
from tests.helpers.paths import real_model, shared

pytestmark = pytest.mark.slow
LETTERS = (" A", " B", " C", " D")


@pytest.fixture(scope="module")
def vllm():
    """The program vllm, of the environment variable VLLM or where --serve finds it, or a skip."""
    try:
        return find_vllm(os.environ.get("VLLM"))
    except UsageError as error:
        pytest.skip(str(error))


def test_an_evaluation_serves_the_model_itself(vllm, tmp_path, capsys):
    """--serve: vLLM is started, its completions agree with those of transformers, and it is stopped."""
    data = shared("data/gsm8k/test.jsonl")
    common = [f"--model_name={real_model('gemma-3-270m-hf')}", f"--data_path={data}", "--limit=4", "--dtype=fp32"]
    own = ["--max_new_tokens=32", f"--output_dir={tmp_path / 'out'}"]
    serving = ["--engine=server", "--serve", f"--vllm={vllm}"]
    assert command.main("gsm8k", [*common, *own, *serving]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out/metrics.json").read_text())
    assert report["counts"]["total"] == 4 and report["engine"]["software"] == "vllm"
    assert report["parity"]["prompts"] == 4 and report["parity"]["explained"] == 1.0
    assert "vLLM is ready after" in capsys.readouterr().err and (tmp_path / "out/vllm.log").exists()


@pytest.fixture(scope="module")
def url(vllm, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    with served(real_model("gemma-3-270m-hf"), vllm, log, dtype="fp32", max_model_len=2048) as address:
        yield address


@pytest.fixture(scope="module")
def engines(url):
    """Transformers and the server."""
    common = {"model_name": str(real_model("gemma-3-270m-hf")), "dtype": "fp32", "batch_size": 8}
    here = engine_class("transformers").start(EvaluationOptions(**common))
    there = engine_class("server").start(EvaluationOptions(**common, engine="server", base_url=url))
    with closing(here), closing(there):
        yield here, there


def test_greedy_completions_are_equal(engines):
    """Of 16 problems, at most one completion may differ, where two tokens are equally likely up to rounding."""
    examples = gsm8k_problems(str(shared("data/gsm8k/test.jsonl")), 2)[:16]
    decoding = Decoding(max_new_tokens=64, stop=("\n\n", "Q:", "Question:", "####", "therefore"))
    prompts = engines[0].encoder.prompts(examples)
    names = [str(index) for index in range(len(prompts))]
    here, there = (dict(engine.generate(prompts, decoding, names)) for engine in engines)
    assert here.keys() == there.keys() == set(range(16)) and any(answer.text for answer in here.values())
    assert sum(here[index] != there[index] for index in here) <= 1


def test_log_likelihoods_are_equal_up_to_rounding(engines):
    """Of 20 questions: answers of one token, and of several, which vLLM computes in another way."""
    problems = mmlu_questions(str(shared("data/mmlu")), 1)[:20]
    tokenizer = engines[0].tokenizer
    questions = questions_of(tokenizer, [problem.prompt for problem in problems[:12]], LETTERS)
    questions += [question_of(tokenizer, problem.prompt, (" A long answer", " it")) for problem in problems[12:]]
    here, there = (dict(engine.log_likelihoods(questions)) for engine in engines)
    for index in range(len(questions)):
        torch.testing.assert_close(torch.tensor(there[index]), torch.tensor(here[index]), rtol=1e-3, atol=1e-3)
