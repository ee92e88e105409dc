"""Benchmarks: generation once, then one benchmark a file.

A benchmark is a module with MAX_NEW_TOKENS, ``examples(data_path)``, ``score(id, prompt, completion, gold)`` and
``summarize(predictions)``. It may have more:

- ``add_options(parser)``, with the names of its options that decide the completions in SETTINGS, of those that
  ``examples`` takes as well in DATA_SETTINGS, and of those that decide the score in SCORE_SETTINGS; ``check(options)``;
- ``answers(model, tokenizer, examples, options, done)``, which yields (index, Completion), where it is not the shared
  generation that answers; ``done`` are the indices that an earlier, interrupted evaluation has left;
- ``judge(predictions, options, output)`` where predictions are scored all at once, which fills in the ``correct``
  that its ``score`` leaves None;
- ``folder(options)``, the name below ``eval/``, and ``remarks(predictions)``, further counts for metrics.json.
"""

from types import ModuleType

from lora_one.evaluation import commonsense, glue, gsm8k, humaneval, math, mmlu

TASKS: dict[str, ModuleType] = {
    "commonsense": commonsense,
    "glue": glue,
    "gsm8k": gsm8k,
    "humaneval": humaneval,
    "math": math,
    "mmlu": mmlu,
}
