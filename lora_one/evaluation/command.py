"""The command line of every evaluation: options -> completions -> scores -> metrics.json and predictions.jsonl."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lora_one.errors import RunError, UsageError, nearest
from lora_one.evaluation import BENCHMARKS
from lora_one.evaluation.benchmark import Benchmark, Prediction
from lora_one.evaluation.engines import TRANSFORMERS
from lora_one.evaluation.generation import generated
from lora_one.evaluation.options import EvaluationOptions, add_options, check_options, parsed
from lora_one.evaluation.output import (
    check_writable,
    data_fingerprints,
    evaluated_run,
    finished_report,
    output_folder,
    show,
    write_lines,
)
from lora_one.evaluation.predictions import remarks_of, rescored_predictions, settings_beside
from lora_one.evaluation.source import check_present, located
from lora_one.files import full_disk, write_json
from lora_one.interruption import note_progress
from lora_one.invocation import Parser, command_name
from lora_one.peers import failed, lost_connection, print_error
from lora_one.records.provenance import provenance


def command() -> int:
    """Run ``lora-one-eval <benchmark> <options>`` on sys.argv; return the exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        benchmarks = "\n".join(f"  {benchmark}" for benchmark in BENCHMARKS)
        print(f"usage: {command_name()} <benchmark> <options>\n\nbenchmarks:\n{benchmarks}\n")
        print(f"{command_name()} <benchmark> --help lists the options of a benchmark.")
        return 0
    return main(name, arguments)


def main(task: str, arguments: Sequence[str]) -> int:
    """Evaluate a model, write metrics.json and predictions.jsonl, print the metrics; return the exit code."""
    return exit_code(lambda: evaluate(task, arguments))


def exit_code(work: Callable[[], int]) -> int:
    """Run a command and return its exit code; an error is printed as one line, by one of several processes."""
    try:
        return work()
    except (UsageError, RunError) as error:
        return reported(str(error), 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        return reported("interrupted: run the same command again to continue", 130)
    except (RuntimeError, OSError) as error:
        known = lost_connection(error) or full_disk(error)
        if known is None:
            raise
        return reported(known, 1)


def reported(message: str, code: int) -> int:
    """Print an error, unless another process does, and return the exit code; the other processes end too."""
    print_error(message)
    failed()
    return code


def evaluate(task: str, arguments: Sequence[str]) -> int:
    """Evaluate a model, from the command line to the results on disk; return the exit code."""
    from lora_one.distributed import Processes  # imported here, as it imports torch: options are checked first

    if task not in BENCHMARKS:
        raise UsageError(f"{task} is not a benchmark; {nearest(task, BENCHMARKS)}")
    benchmark = BENCHMARKS[task]
    options = checked_options(task, benchmark, arguments)
    started = time.perf_counter()
    processes = Processes.started()
    output = output_folder(benchmark.folder(task, options), options)
    finished = finished_report(output, options)
    if finished:
        if processes.rank == 0:
            print(
                f"{output / 'metrics.json'} already exists, with the same model and settings (--overwrite evaluates "
                "again)"
            )
            show(task, finished)
        return 0
    check_present(options)
    check_writable(output)
    fingerprints = data_fingerprints(options)
    if options.rescore:
        found, predictions = None, rescored_predictions(benchmark, Path(options.rescore))
    else:
        if processes.rank == 0:
            warn_of_template(options)
        found = generated(benchmark, options, output, fingerprints, processes)
        predictions = found.predictions
    if processes.rank > 0:
        return 0
    predictions = benchmark.judge(predictions, options, output)
    if options.no_score:
        print(f"{len(predictions)} completions are in {output}: run the command without --no_score to score them")
        return 0
    report = report_of(task, benchmark, options, predictions)
    report |= found.facts if found else {"settings_of_completions": settings_beside(options.rescore)}
    report |= {"seconds": time.perf_counter() - started, "provenance": provenance(fingerprints)}
    write_lines(output / "predictions.jsonl", predictions)
    write_json(output / "metrics.json", report)
    note_progress()
    if found is not None:
        found.partial.remove()
    track(task, options, report, output)
    show(task, report)
    if "warning" in report.get("parity", {}):
        print(report["parity"]["warning"], file=sys.stderr)
    print(f"metrics: {output / 'metrics.json'}")
    return 0


def with_template(benchmark: Benchmark[Any], options: EvaluationOptions) -> EvaluationOptions:
    """Return the options with ``chat_template`` as the evaluated run was trained, if it is not given.

    Raises UsageError: a template for answers that do not follow a prompt.
    """
    possible = benchmark.takes_template(options)
    if options.chat_template and not possible:
        raise UsageError(
            "--chat_template=true is not possible here, because the answers do not follow a turn of the user: leave it "
            "out"
        )
    found = evaluated_run(options)
    chosen = bool(found and found[0].with_template) if options.chat_template is None else options.chat_template
    return replace(options, chat_template=chosen and possible)


def warn_of_template(options: EvaluationOptions) -> None:
    """Print a warning if the evaluated run was trained with a chat template, and this evaluation has none."""
    found = evaluated_run(options)
    if found and found[0].with_template and not options.chat_template:
        print(
            f"warning: {found[0].path} was trained with dataset.chat_template=true, but the prompts of this evaluation "
            "have no chat template",
            file=sys.stderr,
        )


def checked_options(task: str, benchmark: Benchmark[Any], arguments: Sequence[str]) -> EvaluationOptions:
    """Return the checked options of a command line, with the fields that the benchmark sets.

    Raises UsageError, RunError.
    """
    options = parsed(parser_of(task, benchmark), benchmark.options, arguments)
    check_options(options)
    options = benchmark.check(located(options))
    if not options.rescore:
        options = with_template(benchmark, options)
    needed = None if options.engine == TRANSFORMERS or options.rescore else benchmark.needs_model(options)
    if needed is not None:
        raise UsageError(
            f"--engine={options.engine} cannot be used for {needed}, which needs the model in this process: leave "
            "--engine out"
        )
    if options.base_url is not None:
        from lora_one.evaluation.engines.connection import root_of

        root_of(options.base_url)
    if options.serve:
        from lora_one.evaluation.engines.serving import find_vllm

        find_vllm(options.vllm)
    return options


def parser_of(task: str, benchmark: Benchmark[Any]) -> argparse.ArgumentParser:
    """Return the parser of a benchmark's options."""
    called = command_name()
    prog = called if task in called else f"{called} {task}"  # eval/eval_<task>.py has the name of its benchmark
    parser = Parser(prog=prog, description=f"Evaluate a model on {task}.")
    add_options(parser, benchmark.options)
    benchmark.add_spellings(parser)
    return parser


def report_of(
    task: str, benchmark: Benchmark[Any], options: EvaluationOptions, predictions: Sequence[Prediction]
) -> dict[str, Any]:
    """Return the content of metrics.json, except time and provenance."""
    metrics, counts = benchmark.summarize(predictions)
    remarks = remarks_of(benchmark, predictions)
    units = {metric: asdict(unit) for metric, unit in benchmark.units.items()}
    return {
        "task": task,
        "metrics": metrics,
        **({"units": units} if units else {}),
        "counts": counts,
        **({"remarks": remarks} if remarks else {}),
        "model": options.model,
        "settings": options.settings,
    }


def track(task: str, options: EvaluationOptions, report: dict[str, Any], output: Path) -> None:
    """Log the results as a W&B run, if --wandb_name or --wandb_mode is given."""
    if not (options.wandb_name or options.wandb_mode):
        return
    from lora_one.records.tracking import log_evaluation

    mode = options.wandb_mode or "offline"
    config = {"model": report["model"], **report["settings"]}
    found = evaluated_run(options)
    log_evaluation(options.wandb_name, mode, task, report["metrics"], config, output, found[0] if found else None)
