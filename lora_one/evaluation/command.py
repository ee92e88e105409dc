"""The command line that the evaluations share: options, loading, results on disk.

torch and the model come in late, so that --help and a mistyped option answer at once.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lora_one.errors import RunError, UsageError
from lora_one.evaluation.partial_results import PartialResults, Request
from lora_one.files import write_json, write_whole
from lora_one.records.folder import RunFolder, run_of
from lora_one.records.provenance import fingerprint, provenance
from lora_one.types import Example

if TYPE_CHECKING:
    from lora_one.distributed import Processes
    from lora_one.evaluation.generate import Backend, Completion

# What identifies completions; the others only say where and how fast.
SETTINGS = ("data_path", "limit", "adapter", "max_new_tokens", "temperature", "top_p", "seed", "dtype")


def parser_of(task: str, benchmark: ModuleType) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"eval_{task}.py", description=f"Evaluate a model on {task}.")
    add = parser.add_argument
    add(
        "--model_name",
        help="merged checkpoint, other local folder or hub id; the adapter's own base if left out",
    )
    add("--adapter", help="adapter/ folder of a run, scored unmerged on --model_name")
    add("--data_path", help="local file or folder instead of the hub's test split")
    add(
        "--output_dir",
        help="default: eval/<task> in the run's folder (of its epochs/<n>: eval/epochs/<n>/<task>), "
        "else eval_results/<model>/<task>",
    )
    add("--limit", type=int, help="only the first so many examples")
    add(
        "--batch_size",
        type=int,
        help="prompts at a time; it does not change the result (default: 16 on a CPU, else as many as fit)",
    )
    add("--max_new_tokens", type=int, default=benchmark.MAX_NEW_TOKENS, help="per completion (%(default)s)")
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
    add("--wandb_name", help="name of the W&B run (default with --wandb_mode: of the run evaluated, and the task)")
    add(
        "--wandb_mode",
        choices=["online", "offline", "disabled"],
        help="make a W&B run, in the group of the run evaluated (default: offline with --wandb_name, else none)",
    )
    add(
        "--rescore",
        metavar="PREDICTIONS",
        help="score the completions of this predictions.jsonl again, without a model",
    )
    add("--overwrite", action="store_true", help="replace other results in --output_dir")
    parser.set_defaults(num_sample=1, no_score=False, stop=(), labels=None)
    run_hook(benchmark, "add_options", parser)
    return parser


def run_hook(benchmark: ModuleType, name: str, *arguments: Any) -> None:
    """Call what a benchmark may have and need not."""
    if hasattr(benchmark, name):
        getattr(benchmark, name)(*arguments)


def main(task: str, arguments: Sequence[str]) -> int:
    """Evaluate, write metrics.json and predictions.jsonl, print; returns the exit code."""
    return exit_code(lambda: evaluate_task(task, arguments))


def exit_code(work: Callable[[], int]) -> int:
    """Do the work of a command line; an error is one line and its code."""
    try:
        return work()
    except (UsageError, RunError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from what is there", file=sys.stderr)
        return 130


def evaluate_task(task: str, arguments: Sequence[str]) -> int:
    from lora_one.evaluation import TASKS

    benchmark = TASKS[task]
    parser = parser_of(task, benchmark)
    options = parser.parse_args(arguments)
    names = [*SETTINGS, *getattr(benchmark, "SETTINGS", ())]
    check(options, {name: parser.get_default(name) for name in names})
    run_hook(benchmark, "check", options)
    started = time.perf_counter()
    processes = joined()
    output = output_folder(benchmark.folder(options) if hasattr(benchmark, "folder") else task, options)
    generated_by = {} if options.rescore else {name: getattr(options, name) for name in names}
    settings = generated_by | {name: getattr(options, name) for name in getattr(benchmark, "SCORE_SETTINGS", ())}
    finished = finished_before(output, options, settings)
    if finished:
        if processes.rank == 0:
            print(f"{output / 'metrics.json'} is there already, of the same model and settings (--overwrite to redo)")
            show(task, finished)
        return 0
    check_writable(output)
    fingerprints = data_fingerprints(options)
    if options.rescore:
        predictions = rescored(benchmark, Path(options.rescore))
    else:
        identity = {"model": identity_of(options), "settings": generated_by, "fingerprints": fingerprints}
        kept = PartialResults(output / "predictions.partial.jsonl", identity, processes)
        predictions = predicted(benchmark, options, kept)
    if processes.rank > 0:
        return 0
    run_hook(benchmark, "judge", predictions, options, output)
    if options.no_score:
        print(f"{len(predictions)} completions in {output}; the same command without --no_score scores them")
        return 0
    metrics, counts = benchmark.summarize(predictions)
    report = {
        "task": task,
        "metrics": metrics,
        "counts": counts,
        **({"remarks": remarks} if (remarks := remarks_of(benchmark, predictions)) else {}),
        "model": identity_of(options),
        "settings": settings,
        "seconds": time.perf_counter() - started,
        "provenance": provenance(fingerprints),
    }
    write_lines(output / "predictions.jsonl", predictions)
    write_json(output / "metrics.json", report)
    if not options.rescore:
        kept.remove()
    if options.wandb_name or options.wandb_mode:
        from lora_one.records.tracking import log_evaluation

        mode = options.wandb_mode or "offline"
        config = {"model": report["model"], **report["settings"]}
        found = evaluated_run(options)
        log_evaluation(options.wandb_name, mode, task, metrics, config, output, found[0] if found else None)
    show(task, report)
    print(f"metrics: {output / 'metrics.json'}")
    return 0


def remarks_of(benchmark: ModuleType, predictions: Sequence[dict[str, Any]]) -> dict[str, int]:
    """A benchmark's own; and, where there are any, how many prompts left no room in the context, and how many less
    than max_new_tokens."""
    found = {
        "too_long": sum("too_long" in line for line in predictions),
        "cut_to_context": sum("room" in line for line in predictions),
    }
    own = benchmark.remarks(predictions) if hasattr(benchmark, "remarks") else {}
    return {name: count for name, count in found.items() if count} | own


def joined() -> "Processes":
    """This process among those that a launcher started; torch is only needed for several."""
    from lora_one.distributed import Processes

    return Processes.started()


def check(options: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Options against their rules, before anything is loaded; defaults of those that decide the completions."""
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
    unread = [name for name in defaults if options.rescore and getattr(options, name) not in (None, defaults[name])]
    if unread:
        raise UsageError(f"--{unread[0]} is not read with --rescore, which scores every saved completion: leave it out")
    if options.rescore and not Path(options.rescore).is_file():
        raise UsageError(f"--rescore={options.rescore} is no file: give the predictions.jsonl of an evaluation")


def output_folder(task: str, options: argparse.Namespace) -> Path:
    if options.output_dir:
        return Path(options.output_dir).expanduser()
    if options.rescore:
        return Path(options.rescore).parent / "rescored"
    found = evaluated_run(options)
    if found is not None:
        run, model = found
        return run.path / "eval" / (Path("epochs", model.name) if model.parent.name == "epochs" else "") / task
    name = Path(options.adapter).resolve().name if options.adapter else options.model_name.strip("/").replace("/", "--")
    return Path("eval_results") / name / task


def evaluated_run(options: argparse.Namespace) -> tuple[RunFolder, Path] | None:
    """The run that left the adapter or the model, and the path of that; None: no run did."""
    for given in (options.adapter, options.model_name):
        run = run_of(Path(given)) if given else None
        if run is not None:
            return run, Path(given).expanduser().resolve()
    return None


def identity_of(options: argparse.Namespace) -> str:
    return options.model_name or options.adapter or f"completions of {options.rescore}"


def finished_before(output: Path, options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any] | None:
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
    same = report["model"] == identity_of(options) and report["settings"] == settings
    if same and report["provenance"]["fingerprints"] == data_fingerprints(options):
        return report
    raise UsageError(
        f"{file} holds the results of another model or other settings: give --output_dir=<folder> or --overwrite"
    )


def data_fingerprints(options: argparse.Namespace) -> dict[str, str]:
    """Of everything local that the numbers rest on."""
    local = {name: getattr(options, name) for name in ("model_name", "adapter", "data_path", "rescore")}
    paths = {name: Path(value).expanduser() for name, value in local.items() if value}
    return {name: fingerprint(path, nested=name == "data_path") for name, path in paths.items() if path.exists()}


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
            for name, kinds in (("id", str | int), ("prompt", str), ("completion", str)):
                if not isinstance(line[name], kinds):
                    raise TypeError(f"{name} is {line[name]!r:.40}")
            scored = benchmark.score(line["id"], line["prompt"], line["completion"], line["gold"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"--rescore={file}, line {number}: not a prediction ({error!r}); "
                "wanted are id, prompt, completion, gold"
            ) from error
        predictions.append(line | scored)
    return predictions


def predicted(benchmark: ModuleType, options: argparse.Namespace, kept: PartialResults) -> list[dict[str, Any]]:
    """Generate what is not kept yet, and score; in the order of the data, the samples of an example together.

    Of several processes each generates its share, and the first has the predictions of all; the others have none.
    """
    from tqdm import tqdm

    examples = examples_of(benchmark, options)
    requests = [(index, sample) for index in range(len(examples)) for sample in range(options.num_sample)]
    done = kept.read(overwrite=options.overwrite)
    lines: dict[Request, dict[str, Any]] = {}
    right = 0
    alone, first = kept.processes.count == 1, kept.processes.rank == 0
    with tqdm(total=len(requests), desc="evaluation", unit="ex", disable=not first) as bar:

        def take(request: Request, completion: "Completion") -> None:
            nonlocal right
            example = examples[request[0]]
            number = request[0] if example.id is None else example.id
            lines[request] = benchmark.score(number, example.prompt, completion.text, example.gold) | completion.details
            lines[request] |= {"too_long": True} if completion.too_long else {}
            lines[request] |= {} if completion.room is None else {"room": completion.room}
            bar.update()
            if lines[request]["correct"] is not None:
                right += lines[request]["correct"]
                bar.set_postfix(accuracy=f"{right / len(lines):.3f}", refresh=False)

        for request, completion in done.items():
            take(request, completion)
        for request, completion in remaining(benchmark, examples, requests, done, options):
            kept.add(request, completion)
            done[request] = completion
            take(request, completion)
        kept.processes.meet()
        if not first:
            return []
        for request, completion in {} if alone else kept.gathered().items():
            if request not in done:
                done[request] = completion
                take(request, completion)
    too_long = sum(completion.too_long for completion in done.values())
    if too_long:
        print(
            f"warning: {too_long} completions are empty, their prompts leave no room in the model's context",
            file=sys.stderr,
        )
    return [lines[request] for request in requests]


def examples_of(benchmark: ModuleType, options: argparse.Namespace) -> list[Example]:
    """The first --limit examples, unless the benchmark itself says what the limit counts."""
    choices = {name: getattr(options, name) for name in getattr(benchmark, "DATA_SETTINGS", ())}
    found = benchmark.examples(options.data_path, **choices)
    return found if "limit" in choices else found[: options.limit]


def remaining(
    benchmark: ModuleType,
    examples: Sequence[Example],
    requests: Sequence[Request],
    done: Collection[Request],
    options: argparse.Namespace,
) -> Iterable[tuple[Request, "Completion"]]:
    """Completions as they come, of the requests that are not done: the benchmark's own answers, or generated ones."""
    asked = [request for request in requests if request not in done]
    if not hasattr(benchmark, "answers"):
        yield from generated(examples, asked, options)
    elif asked:
        known = {index for index, _ in done}
        for index, completion in benchmark.answers(*load(options), examples, options, known):
            yield (index, 0), completion


def generated(
    examples: Sequence[Example], requests: Sequence[Request], options: argparse.Namespace
) -> Iterable[tuple[Request, "Completion"]]:
    """Completions as they come; nothing is loaded where nothing is wanted."""
    if not requests:
        return
    from lora_one.evaluation.generate import Decoding

    engine = backend(options)
    prompts = engine.prompts(examples)
    sampling = (options.temperature, options.top_p, options.seed)
    decoding = Decoding(options.max_new_tokens, *sampling, stop=options.stop)
    asked = [prompts[index] for index, _ in requests]
    streams = [f"{index}:{sample}" for index, sample in requests]
    for position, completion in engine.complete(asked, decoding, streams):
        yield requests[position], completion


def backend(options: argparse.Namespace) -> "Backend":
    """What generates: the seam where another engine than transformers would be chosen."""
    from lora_one.evaluation.generate import Transformers

    model, tokenizer = load(options)  # which settles the batch size
    return Transformers(model, tokenizer, options.batch_size)


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    from lora_one.adaptation.checkpoints import kind_of_adapter, load_adapter
    from lora_one.data.encode import pad_id_of
    from lora_one.evaluation.batches import automatic
    from lora_one.models import kind_of_checkpoint, load_model, load_tokenizer, padded_with
    from lora_one.records.folder import base_of

    name = options.model_name
    adapter = Path(options.adapter).expanduser() if options.adapter else None
    if name is None:
        config = adapter / "adapter_config.json"
        if not config.exists():
            raise UsageError(f"--adapter={adapter} holds no adapter_config.json: give the adapter/ folder of a run")
        name = json.loads(config.read_text())["base_model_name_or_path"]
    kind = (kind_of_adapter(adapter) if adapter is not None else None) or kind_of_checkpoint(name)
    if kind.has_head and options.labels is None:
        raise UsageError(
            f"{identity_of(options)} has a classification head and writes nothing: give a model that generates, or "
            "score it with eval_glue.py"
        )
    labels = options.labels if adapter is not None and kind.has_head else None
    options_of_model = {"dtype": options.dtype, "model_type": kind.name, "labels": labels}
    model = load_model(name, where=options.device, **options_of_model | base_of(adapter))
    if options.batch_size is None:
        options.batch_size = automatic(model)
    if adapter is not None:
        model = load_adapter(model, adapter)
    tokenizer = load_tokenizer(name, model_type=kind.name)
    if kind.has_head:
        padded_with(model, pad_id_of(tokenizer))
    return model.eval(), tokenizer


def check_writable(output: Path) -> None:
    """Before the work, not after it. Raises RunError."""
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f"{output} cannot be written ({there} is no writable folder): give --output_dir=<one that is>")


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def show(task: str, report: dict[str, Any]) -> None:
    metrics, counts = report["metrics"], report["counts"]
    for name, value in metrics.items():
        if not name.endswith("_stderr"):
            print(f"{task} {name}: {100 * value:.2f} +- {100 * metrics[f'{name}_stderr']:.2f} %")
    for part in (counts, report.get("remarks", {})):
        if part:
            print("  ".join(f"{name} {count}" for name, count in part.items()))
