"""Create the small random models and data files for scripts/record_behaviour.py; their bytes are always the same."""

import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
COMPARISON = """title: Two starts
common: [model=tiny, wandb.mode=disabled, dataset.cache=null, dataset.train_size=48, dataset.validation_size=8,
  dataset.accuracy_examples=0, model.real_batch_size=8, model.per_device_batch_size=8]
test: [dataset.data_seed=1]
test_examples: 8
tuning_seeds: [1]
seeds: [1, 2]
grid: {model.learning_rate: [2e-3, 5e-3]}
methods:
  LoRA-One: [init=gradient]
  LoRA: [init=default]
"""


def make_inputs(place: Path, repository: Path) -> None:
    """Write models, tokenizers and data to a folder, which gets its final name when it is complete."""
    scratch = place.with_name(f".{place.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    make_models(scratch, repository / "lora_one" / "assets" / "tiny")
    make_data(scratch)
    scratch.rename(place)


def make_models(place: Path, bundled: Path) -> None:
    """Write one model of each kind with its tokenizer."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "of", "number", "good", "bad", *"0123456789"]
    pieces = transformers.BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    wide = WIDTHS | {"vocab_size": len(tokenizer), "initializer_range": 0.1}
    two = {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer)}
    ends = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    kinds = {
        "llama": ("Llama", "ForCausalLM", wide | two | {"max_position_embeddings": 512}, tokenizer),
        "t5": ("T5", "ForConditionalGeneration", sizes | ends, tokenizer),
        "roberta": (
            "Roberta",
            "ForSequenceClassification",
            wide | {"max_position_embeddings": 66, "pad_token_id": 1},
            tokenizer,
        ),
        "bert": ("Bert", "ForSequenceClassification", wide | {"max_position_embeddings": 64}, pieces),
    }
    for name, (family, purpose, settings, its_tokenizer) in kinds.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**settings)
        getattr(transformers, f"{family}{purpose}")(config).save_pretrained(place / name)
        its_tokenizer.save_pretrained(place / name)


def problems(count: int, seed: int) -> list[tuple[str, int]]:
    """Return random questions with their answers."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        name, many, more = draw.choice(["Ann", "Ben", "Eva"]), draw.randint(2, 60), draw.randint(2, 30)
        found.append((f"{name} has {many} coins. {name} gets {more} more coins. How many are there?", many + more))
    return found


def make_data(place: Path) -> None:
    """Write data files in the formats of the data sets and the benchmarks."""
    rows, others = problems(60, 0), problems(20, 1)
    write(place / "gsm8k.jsonl", ({"question": ask, "answer": f"They add up.\n#### {say}"} for ask, say in rows))
    write(place / "clean.jsonl", ({"question": ask, "answer": f"#### {say}"} for ask, say in [*others, *rows[:3]]))
    write(place / "own.jsonl", ({"ask": ask, "say": f"It is {say}."} for ask, say in rows))
    boxed = ({"problem": ask, "solution": rf"So \boxed{{{say}}}", "level": "Level 1"} for ask, say in others[:4])
    write(place / "math.jsonl", boxed)
    functions = (
        {
            "task_id": f"Own/{n}",
            "prompt": f"def f{n}(x):\n",
            "entry_point": f"f{n}",
            "test": "def check(f):\n    pass\n",
        }
        for n in range(3)
    )
    write(place / "humaneval.jsonl", functions)
    for split, count in (("train", 48), ("dev", 16)):
        lines = [f"a {'good' if n % 2 else 'bad'} film of number {n}\t{n % 2}" for n in range(count)]
        text("\n".join(["sentence\tlabel", *lines]) + "\n", place / "sst2" / f"{split}.tsv")
    for split, count in (("dev", 3), ("test", 6)):
        for subject in ("virology", "abstract_algebra"):
            lines = [f"Is {n} and {n} {2 * n}?,yes,no,{n},none,{'ABCD'[n % 4]}" for n in range(count)]
            text("\n".join(lines) + "\n", place / "mmlu" / split / f"{subject}_{split}.csv")
    for name, answers in {"boolq": ("true", "false"), "piqa": ("solution1", "solution2")}.items():
        for split, count in (("train", 32), ("test", 6)):
            asked = [(f"Is {n} odd?\n\nAnswer format: {'/'.join(answers)}", answers[n % 2 == 0]) for n in range(count)]
            found = [{"instruction": a, "output": f"the correct answer is {b}", "answer": b} for a, b in asked]
            text(json.dumps(found), place / "commonsense" / name / f"{split}.json")
    text(COMPARISON, place / "comparison.yaml")


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    text("".join(json.dumps(row) + "\n" for row in rows), file)


def text(content: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
