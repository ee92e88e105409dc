"""Benchmarks: generation once, then one benchmark a file.

A benchmark is a module with MAX_NEW_TOKENS, ``examples(data_path)``, ``score(id, prompt, completion, gold)`` and
``summarize(predictions)``. It may have more: ``add_options(parser)``, with the names of its options that decide the
completions in SETTINGS and of those that decide the score in SCORE_SETTINGS; ``check(options)``; and
``judge(predictions, options, output)`` where predictions are scored all at once, which fills in the ``correct``
that its ``score`` leaves None.
"""

from types import ModuleType

from lora_one.evaluation import gsm8k, humaneval

TASKS: dict[str, ModuleType] = {"gsm8k": gsm8k, "humaneval": humaneval}
