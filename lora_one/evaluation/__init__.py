"""Benchmarks: one per file, each an instance of a subclass of ``benchmark.Benchmark``."""

from typing import Any

from lora_one.evaluation import commonsense, glue, gsm8k, humaneval, math, mmlu, text
from lora_one.evaluation.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark[Any]] = {
    "commonsense": commonsense.Commonsense(),
    "glue": glue.Glue(),
    "gsm8k": gsm8k.GSM8K(),
    "humaneval": humaneval.HumanEval(),
    "math": math.Math(),
    "mmlu": mmlu.MMLU(),
    "text": text.Text(),
}
