"""The part ``eval`` of gpu.py: GSM8K and MMLU in batches and one example at a time, on a model of random weights.

GSM8K: generated problems in GSM8K's prompt, greedy decoding, with the number of new tokens in the settings (a random
model never stops by itself). MMLU: made-up 5-shot questions as long as those of MMLU. agreement: the share of equal
answers. In bf16 rounding changes the closest choices of a random model; a trained model may behave differently.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from bench_eval import (
    POSITIONS,
    byte_level_tokenizer,
    completions_in_batches,
    completions_one_by_one,
    letters_in_batches,
    letters_one_by_one,
)
from common import SHAPES
from gpu_init import random_llama
from made_up import mmlu_problems
from rows import Row, Table, timed

from lora_one.datasets.arithmetic import PRETRAIN_FAMILIES, generate
from lora_one.datasets.gsm8k import PROMPT

ONE, MANY = "one at a time", "in batches"


def main(chosen: argparse.Namespace, _: str) -> int:
    few, letters, many, tokens = (2, 3, 4, 4) if chosen.small else (6, 48, 64, 64)
    name = "small" if chosen.small else "llama2-7b"
    settings = {"shape": name, "dtype": "bfloat16", "new tokens": tokens, "gsm8k": f"{few} and {many} problems"}
    table = Table(chosen.out, "eval", chosen.device, settings | {"mmlu": f"{letters} questions"}, chosen.seconds)
    problems = mmlu_problems(1, letters)
    texts = {*(problem.body + problem.response for problem in problems), *(shot for p in problems for shot in p.shots)}
    tokenizer = byte_level_tokenizer(sorted(texts))
    model = random_llama(SHAPES[name], chosen.device, torch.bfloat16, len(tokenizer))
    model.config.max_position_embeddings = POSITIONS  # possible because positions are computed, not learned
    prompts = [PROMPT.format(question=row["question"]) for row in generate(PRETRAIN_FAMILIES, many, 0)]
    answers: dict[str, list[str]] = {}

    def row(task: str, way: str, work: Callable[[], list[str]], count: int) -> None:
        table.row(f"{task}, {way}", partial(measured, answers, f"{task}, {way}", work, count))
        table.write(ratios=ratios(table))

    # the shorter case first: it is the warm-up of the longer one
    row("gsm8k", ONE, lambda: completions_one_by_one(model, tokenizer, prompts[:few], tokens), few)
    row("gsm8k", MANY, lambda: completions_in_batches(model, tokenizer, prompts, tokens, many), many)
    row("mmlu", ONE, lambda: letters_one_by_one(model, tokenizer, problems), letters)
    row("mmlu", MANY, lambda: letters_in_batches(model, tokenizer, problems, 16), letters)
    return int(any("error" in row for row in table.rows))


def measured(answers: dict[str, list[str]], name: str, work: Callable[[], list[str]], count: int) -> Row:
    """Measure one pass, which takes seconds; long cases have a warm-up."""

    def once() -> None:
        answers[name] = work()

    row = timed(once, repeats=1, seconds=10.0, warm_up=count > 8)
    task, _, way = name.partition(", ")
    first = answers.get(f"{task}, {ONE}", [])
    alike = [mine == other for mine, other in zip(answers[name], first, strict=False)]
    row["agreement"] = sum(alike) / len(alike) if way == MANY and alike else None
    return row | {"examples": count, "examples_per_second": count / row["seconds"]}


def ratios(table: Table) -> dict[str, float]:
    found = {}
    for task in ("gsm8k", "mmlu"):
        many, one = (table.value(f"{task}, {way}", "examples_per_second") for way in (MANY, ONE))
        if many and one:
            found[f"{task}, examples/s: {MANY} / {ONE}"] = many / one
    return found
