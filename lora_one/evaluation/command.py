"""The command line that the evaluations share: options, loading, results on disk.

torch and the model come in late, so that --help and a mistyped option answer at once.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_one.errors import RunError, UsageError
from lora_one.provenance import fingerprint, provenance
from lora_one.run_folder import write_json

# What identifies a result; the others only say where and how fast.
SETTINGS = ("data_path", "limit", "adapter", "max_new_tokens", "temperature", "top_p", "seed", "dtype")


def parser_of(task: str, max_new_tokens: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"eval_{task}.py", description=f"Evaluate a model on {task}.")
    add = parser.add_argument
    add(
        "--model_name",
        help="merged checkpoint, other local folder or hub id; the adapter's own base if left out",
    )
    add("--adapter", help="adapter/ folder of a run, scored unmerged on --model_name")
    add("--data_path", help="local file or folder instead of the hub's test split")
    add("--output_dir", help="default: eval/<task> in the run's folder, else eval_results/<model>/<task>")
    add("--limit", type=int, help="only the first so many examples")
    add(
        "--batch_size",
        type=int,
        default=16,
        help="prompts at a time; it does not change the result (%(default)s)",
    )
    add("--max_new_tokens", type=int, default=max_new_tokens, help="per completion (%(default)s)")
    add("--temperature", type=float, help="sample with this temperature; greedy if left out")
    add("--top_p", type=float, help="with --temperature: sample from this much probability")
    add("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    add(
        "--dtype",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto: as the checkpoint is stored",
    )
    add("--device", help="cuda, cuda:1, mps, cpu; default: an accelerator if there is one")
    add("--wandb_name", help="name of the W&B run; none is made without it")
    add("--wandb_mode", choices=["online", "offline", "disabled"], default="offline")
    add(
        "--rescore",
        metavar="PREDICTIONS",
        help="score the completions of this predictions.jsonl again, without a model",
    )
    add("--overwrite", action="store_true", help="replace other results in --output_dir")
    return parser


def main(task: str, arguments: Sequence[str]) -> int:
    """Evaluate, write metrics.json and predictions.jsonl, print; returns the exit code."""
    try:
        return evaluate_task(task, arguments)
    except (UsageError, RunError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        return 130


def evaluate_task(task: str, arguments: Sequence[str]) -> int:
    from lora_one.evaluation import TASKS

    benchmark = TASKS[task]
    parser = parser_of(task, benchmark.MAX_NEW_TOKENS)
    options = parser.parse_args(arguments)
    check(options, vars(parser.parse_args([])))
    started = time.perf_counter()
    output = output_folder(task, options)
    finished = finished_before(output, options)
    if finished:
        print(f"{output / 'metrics.json'} is there already, of the same model and settings (--overwrite to redo)")
        show(task, finished)
        return 0
    check_writable(output)
    predictions = rescored(benchmark, Path(options.rescore)) if options.rescore else predicted(benchmark, options)
    metrics, counts = benchmark.summarize(predictions)
    report = {
        "task": task,
        "metrics": metrics,
        "counts": counts,
        "model": identity(options),
        "settings": settings_of(options),
        "seconds": time.perf_counter() - started,
        "provenance": provenance(data_fingerprints(options)),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_lines(output / "predictions.jsonl", predictions)
    write_json(output / "metrics.json", report)
    if options.wandb_name:
        from lora_one.tracking import log_evaluation

        log_evaluation(options.wandb_name, options.wandb_mode, task, metrics, report["settings"], output)
    show(task, report)
    print(f"metrics: {output / 'metrics.json'}")
    return 0


def check(options: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Options against their rules, before anything is loaded."""
    if not (options.model_name or options.adapter or options.rescore):
        raise UsageError("nothing to evaluate: give --model_name=<folder or hub id>, --adapter=<folder>, or --rescore")
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value} must be at least 1: give a larger number or leave it out")
    if options.temperature is not None and not (0 < options.temperature < math.inf):
        raise UsageError(f"--temperature={options.temperature} must be positive; leave it out for greedy decoding")
    if options.top_p is not None and not (options.temperature and 0 < options.top_p <= 1):
        raise UsageError(f"--top_p={options.top_p} must lie in (0, 1] and needs --temperature")
    for name in ("adapter", "data_path", "rescore"):
        value = getattr(options, name)
        if value is not None and not Path(value).expanduser().exists():
            raise UsageError(f"--{name}={value} does not exist (looked in {Path.cwd()}): give what there is")
    unread = [name for name in SETTINGS if options.rescore and getattr(options, name) not in (None, defaults[name])]
    if unread:
        raise UsageError(f"--{unread[0]} is not read with --rescore, which scores every saved completion: leave it out")
    if options.rescore and not Path(options.rescore).is_file():
        raise UsageError(f"--rescore={options.rescore} is no file: give the predictions.jsonl of an evaluation")


def output_folder(task: str, options: argparse.Namespace) -> Path:
    if options.output_dir:
        return Path(options.output_dir).expanduser()
    if options.rescore:
        return Path(options.rescore).parent / "rescored"
    for given in (options.adapter, options.model_name):
        folder = Path(given).expanduser().resolve() if given else None
        if folder is not None and (folder.parent / "run.json").exists():
            return folder.parent / "eval" / task
    model = (
        Path(options.adapter).resolve().name if options.adapter else options.model_name.strip("/").replace("/", "--")
    )
    return Path("eval_results") / model / task


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on; of a rescored file its completions alone."""
    return {} if options.rescore else {name: getattr(options, name) for name in SETTINGS}


def identity(options: argparse.Namespace) -> str:
    return options.model_name or options.adapter or f"completions of {options.rescore}"


def finished_before(output: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """The report of the same evaluation, if it is finished. Raises UsageError: another one's results are there."""
    file = output / "metrics.json"
    if options.rescore and (output / "predictions.jsonl").resolve() == Path(options.rescore).resolve():
        raise UsageError(f"--output_dir={output} holds the file that is rescored: give another folder")
    if options.overwrite or not file.exists():
        return None
    try:
        report = json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f"{file} is not readable JSON ({error}): move it away, or --overwrite") from error
    same = report["model"] == identity(options) and report["settings"] == settings_of(options)
    if same and report["provenance"]["fingerprints"] == data_fingerprints(options):
        return report
    raise UsageError(
        f"{file} holds the results of another model or other settings: give --output_dir=<folder> or --overwrite"
    )


def data_fingerprints(options: argparse.Namespace) -> dict[str, str]:
    """Of everything local that the numbers rest on."""
    local = {name: getattr(options, name) for name in ("model_name", "adapter", "data_path", "rescore")}
    paths = {name: Path(value).expanduser() for name, value in local.items() if value}
    return {name: fingerprint(path) for name, path in paths.items() if path.exists()}


def rescored(benchmark: Any, file: Path) -> list[dict[str, Any]]:
    """Raises UsageError: a line lacks what is scored."""
    predictions = []
    try:
        lines = file.read_text().rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"--rescore={file} is no text: give the predictions.jsonl of an evaluation") from error
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            scored = benchmark.score(line["id"], line["prompt"], line["completion"], line["gold"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--rescore={file}, line {number}: not a prediction ({error!r}); "
                "wanted are id, prompt, completion, gold"
            ) from error
        predictions.append(scored)
    return predictions


def predicted(benchmark: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Load, generate, score; in the order of the data."""
    from tqdm import tqdm

    from lora_one.data.encode import prompt_ids
    from lora_one.evaluation.generate import Decoding, complete

    examples = benchmark.examples(options.data_path)[: options.limit]
    model, tokenizer = load(options)
    prompts = prompt_ids(tokenizer, [example.prompt for example in examples])
    decoding = Decoding(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    lines: dict[int, dict[str, Any]] = {}
    right = too_long = 0
    with tqdm(total=len(examples), desc="evaluation", unit="ex") as bar:
        for index, completion in complete(model, tokenizer, prompts, decoding, options.batch_size):
            example = examples[index]
            lines[index] = benchmark.score(index, example.prompt, completion.text, example.gold)
            right += lines[index]["correct"]
            too_long += completion.too_long
            bar.update()
            bar.set_postfix(accuracy=f"{right / len(lines):.3f}", refresh=False)
    if too_long:
        print(
            f"warning: {too_long} prompts leave no room in the model's context; they count as unparsed",
            file=sys.stderr,
        )
    return [lines[index] for index in range(len(examples))]


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    from lora_one.checkpoints import load_adapter
    from lora_one.models import load_model, load_tokenizer
    from lora_one.run_folder import base_of

    name = options.model_name
    adapter = Path(options.adapter).expanduser() if options.adapter else None
    if name is None:
        config = adapter / "adapter_config.json"
        if not config.exists():
            raise UsageError(f"--adapter={adapter} holds no adapter_config.json: give the adapter/ folder of a run")
        name = json.loads(config.read_text())["base_model_name_or_path"]
    model = load_model(name, where=options.device, **{"dtype": options.dtype} | base_of(adapter))
    if adapter is not None:
        model = load_adapter(model, adapter)
    return model.eval(), load_tokenizer(name)


def check_writable(output: Path) -> None:
    """Before the work, not after it. Raises RunError."""
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f"{output} cannot be written ({there} is no writable folder): give --output_dir=<one that is>")


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def show(task: str, report: dict[str, Any]) -> None:
    metrics, counts = report["metrics"], report["counts"]
    for name, value in metrics.items():
        if not name.endswith("_stderr"):
            print(f"{task} {name}: {100 * value:.2f} +- {100 * metrics[f'{name}_stderr']:.2f} %")
    print("  ".join(f"{name} {count}" for name, count in counts.items()))
