"""Batches of an evaluation: shared out among processes, halved where memory is short, and the answers the same."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lora_one.data.encode import prompt_ids
from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.evaluation.batches import each_batch
from lora_one.evaluation.command import main
from lora_one.evaluation.decoding import Decoding
from lora_one.evaluation.generate import complete
from tests.helpers.paths import ROOT


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_processes_share_the_batches(count):
    order = list(range(17))
    shares = [
        [index for batch, _ in each_batch(order, 4, len, processes=Processes(rank, count)) for index in batch]
        for rank in range(count)
    ]
    assert sorted(index for share in shares for index in share) == order
    whole = {tuple(batch) for batch, _ in each_batch(order, 4, len)}
    for rank in range(count):
        assert {tuple(batch) for batch, _ in each_batch(order, 4, len, (), Processes(rank, count))} <= whole


def test_finished_batches_are_skipped_and_the_others_unchanged():
    batches = [list(batch) for batch, _ in each_batch([5, 4, 3, 2, 1, 0], 2, len, done={5, 4, 3})]
    assert batches == [[3, 2], [1, 0]]


def test_out_of_memory_halves_this_and_all_later_batches():
    asked = []

    def work(part):
        asked.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("no memory")
        return list(part)

    found = [index for _, part in each_batch(list(range(20)), 8, work) for index in part]
    assert found == list(range(20)), "each once, in order"
    assert asked[:3] == [8, 4, 2] and max(asked[3:]) == 2


def test_one_prompt_beyond_memory_is_an_error():
    def work(part):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(RunError, match=r"a single prompt does not fit.*--dtype=bf16"):
        list(each_batch([0, 1], 2, work))


def test_halved_batches_give_the_same_completions(llama, tokenizer, monkeypatch):
    prompts = prompt_ids(tokenizer, [f"Q: {'a' * size}\nA: " for size in (3, 1, 9, 4, 7)])
    expected = dict(complete(llama, tokenizer, prompts, Decoding(6), 1))
    generate = type(llama).generate

    def short(self, *arguments, **options):
        if len(options["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no memory")
        return generate(self, *arguments, **options)

    monkeypatch.setattr(type(llama), "generate", short)
    assert dict(complete(llama, tokenizer, prompts, Decoding(6), 5)) == expected


def test_several_processes_give_the_results_of_one(tmp_path, llama_folder):
    """Under torchrun: one set of files, line for line those of a single process; then nothing is left to do."""
    rows = [{"question": f"How many is {i} and {i}?" * (i + 1), "answer": f"#### {2 * i}"} for i in range(7)]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [f"--model_name={llama_folder}", f"--data_path={data}", "--max_new_tokens=6", "--batch_size=2"]
    assert main("gsm8k", [*command, f"--output_dir={tmp_path / 'one'}"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(ROOT / "eval/eval_gsm8k.py"), *command, f"--output_dir={tmp_path / 'two'}"]
    done = subprocess.run(
        [*launcher, *script], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("metrics: ") == 1, "the first process speaks"
    one, two = (tmp_path / name / "predictions.jsonl" for name in ("one", "two"))
    assert two.read_text() == one.read_text()
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == ["metrics.json", "predictions.jsonl"]
