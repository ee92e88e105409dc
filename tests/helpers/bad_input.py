"""Broken data and models, and what every error of a program must look like."""

import gzip
import json
import random
import re
import shutil
from pathlib import Path

from lora_one import models

USAGE, FAILURE = 2, 1  # exit codes: wrongly asked for, failed on the way


def broken_files(folder: Path) -> Path:
    """Fill the folder with broken data and models; return it."""
    problems = "".join(json.dumps({"question": f"{i}+0?", "answer": f"#### {i}"}) + "\n" for i in range(50))
    rows = '{"prompt": "a", "response": "b"}\n'
    columns = ("task_id", "prompt", "entry_point", "test")
    humaneval = [json.dumps(dict.fromkeys(columns, "") | {"task_id": f"Mine/{i}"}) + "\n" for i in range(2)]
    sample = [json.dumps({"task_id": f"Mine/{i}", "completion": ""}) + "\n" for i in range(8)]
    texts = {
        "problems.jsonl": "".join(humaneval),
        "twice.jsonl": humaneval[0] * 2,
        "one.jsonl": sample[0],
        "uneven.jsonl": sample[0] + sample[1] + sample[0],
        "unknown.jsonl": sample[0] + sample[1] + sample[7],
        "null.jsonl": sample[0] + '{"task_id": "Mine/1", "completion": null}\n',
        "gsm8k.jsonl": problems,
        "json.jsonl": rows,
        "hello.txt": "hello",
        "word.jsonl": '{"prompt": "a", "response": "<think> b"}\n' * 56,
        "word-gsm8k.jsonl": '{"question": "<think>", "answer": "#### 2"}\n',
        "model.gguf": "GGUF",
        "empty.jsonl": "",
        "header.csv": "prompt,response\n",
        "cut.jsonl": rows + rows[:15],
        "untrained/test.jsonl": rows,
        "twice/train.jsonl": rows,
        "twice/train.csv": "prompt,response\na,b\n",
        "empty/notes": "",
        "labels.tsv": "x\t1\t\tgood\nx\t7\t\tbad\n",
        "words.tsv": "x\t1\t\tgood\nx\t0\t\tbad\n",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "random.jsonl").write_bytes(random.Random(0).randbytes(4000))
    packed = gzip.compress(problems.encode())
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    for name, size in (("cut-header", 50), ("cut-weights", -1000)):
        shutil.copytree(models.BUNDLED / "tiny", folder / name)
        weights = folder / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:size])
    shutil.copytree(models.BUNDLED / "tiny", folder / "no-weights", ignore=lambda *_: ["model.safetensors"])
    special = {"grown": {"additional_special_tokens": ["<think>"]}, "grown-padding": {"pad_token": "[PAD]"}}
    for name, added in special.items():
        shutil.copytree(models.BUNDLED / "tiny", folder / name)
        tokenizer = models.load_tokenizer("bundled/tiny")
        tokenizer.add_special_tokens(added)
        tokenizer.save_pretrained(folder / name)
    return folder


def is_one_line(said: list[str], fragments: tuple[str, ...], *, alone: bool) -> None:
    """The error is the last line, its fragments in this order; alone: nothing else was said."""
    print(said[-1])
    pattern = "error: .*" + ".*".join(map(re.escape, fragments))
    assert re.match(pattern, said[-1]), (said[-1], fragments)
    assert not any(text.startswith(("error:", "Traceback")) for text in said[:-1]), "one message, no traceback"
    if alone:
        assert len(said) == 1, said
