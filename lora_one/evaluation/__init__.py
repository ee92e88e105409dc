"""Benchmarks: generation once, then one benchmark a file.

A benchmark is a module with MAX_NEW_TOKENS, ``examples(data_path)``, ``score(id, prompt, completion, gold)`` and
``summarize(predictions)``.
"""

from types import ModuleType

from lora_one.evaluation import gsm8k

TASKS: dict[str, ModuleType] = {"gsm8k": gsm8k}
