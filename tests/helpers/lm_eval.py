"""Run lm_eval on local rows; its own tasks of the commonsense sets, with the same solved examples for each question."""

import json
import random
import warnings
from pathlib import Path

import torch

TASKS = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "social_i_qa": "siqa/siqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "ARC-Easy": "arc/arc_easy.yaml",
    "ARC-Challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}


def task_of(name, rows, shots, folder):
    """The configuration of lm_eval's task, reading these rows, and these solved examples in their order."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    files = {}
    for split, part in (("test", rows), ("shots", shots)):
        if part:
            files[split] = str(folder / f"{name}.{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in part))
    task = load_yaml(Path(lm_eval.tasks.__file__).parent / TASKS[name])
    task |= {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    task |= {"test_split": "test", "training_split": None, "validation_split": None}
    return task | ({"fewshot_split": "shots", "fewshot_config": {"sampler": "first_n"}} if shots else {})


def samples_of(tasks, model, tokenizer, num_fewshot=0, batch_size=32):
    """Task -> lm_eval's samples, in the order of the rows."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm_eval's and those of what it imports
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        state = random.getstate()
        try:
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=tasks,
                task_manager=TaskManager(include_defaults=False),
                num_fewshot=num_fewshot,
                log_samples=True,
                bootstrap_iters=0,
                cache_requests=False,
            )
        finally:
            random.setstate(state)
    return {name: sorted(samples, key=lambda sample: sample["doc_id"]) for name, samples in found["samples"].items()}
