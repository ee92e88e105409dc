"""Score existing HumanEval samples: run the programs, write the result of each, print pass@k."""

import argparse
import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.errors import RunError, UsageError, nearest
from lora_one.evaluation import humaneval
from lora_one.evaluation.command import exit_code
from lora_one.evaluation.options import add_options, check_path, fields_deciding, option, parsed
from lora_one.evaluation.output import check_writable, show, write_lines
from lora_one.files import fingerprint, write_json
from lora_one.invocation import Parser, command_name
from lora_one.records.provenance import provenance


@dataclass(frozen=True, kw_only=True)
class SampleOptions(humaneval.SandboxOptions):
    """Options for scoring samples."""

    sample_file: str = option(help="samples.jsonl with task_id and completion in each line (also .gz)")
    k: str | None = option(
        None,
        help="one or several numbers, such as 1,10, at most the samples per problem (default: 1, 10, 100 if possible)",
    )
    data_path: str | None = option(None, spellings=["--problem_file"], help="local HumanEval file instead of the hub's")
    allow_missing: bool = option(False, help="score only the problems that have samples")


def parser() -> argparse.ArgumentParser:
    """Return the parser of evaluate_functional_correctness.py."""
    made = Parser(prog=command_name(), description="Score HumanEval samples: pass@k.")
    add_options(made, SampleOptions)
    return made


def main(arguments: Sequence[str]) -> int:
    """Write <sample_file>_results.jsonl and <sample_file>_metrics.json, print the metrics; return the exit code."""
    return exit_code(lambda: evaluate(arguments))


def evaluate(arguments: Sequence[str]) -> int:
    """Score the samples, from the command line to the results on disk; return the exit code."""
    options = parsed(parser(), SampleOptions, arguments)
    ks = given_ks(options.k)
    check_path("data_path", options.data_path or None)
    file = Path(options.sample_file).expanduser()
    samples = read_samples(file)
    problems = humaneval.problems(options.data_path)
    fewest = check_samples(samples, problems, file, allow_missing=options.allow_missing)
    if any(k > fewest for k in ks):
        raise UsageError(
            f"--k={max(ks)} exceeds {fewest}, the smallest number of samples of a problem in {file}: pass "
            f"--k={fewest} or less, or a file with more samples"
        )
    ks = ks or [k for k in humaneval.USUAL_K if k <= fewest]
    check_writable(file.parent)
    humaneval.check_sandbox(options)
    started = time.perf_counter()
    programs = [humaneval.program_of(problems[sample["task_id"]], sample["completion"]) for sample in samples]
    results = humaneval.results_of(programs, options)
    outcomes: dict[str, list[bool]] = {}
    for sample, result in zip(samples, results, strict=True):
        outcomes.setdefault(sample["task_id"], []).append(result == "passed")
    lines = [s | {"passed": r == "passed", "result": r} for s, r in zip(samples, results, strict=True)]
    paths = {"sample_file": file} | ({"data_path": Path(options.data_path).expanduser()} if options.data_path else {})
    report = {
        "task": "humaneval",
        "metrics": humaneval.pass_at(outcomes.values(), ks),
        "counts": humaneval.counts_of(results),
        "model": f"samples of {file}",
        "settings": {
            "k": ks,
            **{field.name: getattr(options, field.name) for field in fields_deciding(SampleOptions, "score")},
        },
        "seconds": time.perf_counter() - started,
        "provenance": provenance({name: fingerprint(path) for name, path in paths.items()}),
    }
    write_lines(Path(f"{file}_results.jsonl"), lines)
    write_json(Path(f"{file}_metrics.json"), report)
    show("humaneval", report)
    print(f"results: {file}_results.jsonl")
    return 0


def given_ks(text: str | None) -> list[int]:
    """Return the numbers in a text such as ``1,10``, ascending; [] for None. Raises UsageError: another form."""
    try:
        ks = sorted({int(part) for part in text.split(",")}) if text is not None else []
    except ValueError:
        ks = [0]
    if ks and ks[0] < 1:
        raise UsageError(f"--k={text} must be positive integers: pass --k=1 or --k=1,10")
    return ks


def read_samples(file: Path) -> list[dict[str, Any]]:
    """Return the samples of a file.

    Raises UsageError: not a file, or a line is not a sample; RunError: the file cannot be read.
    """
    if not file.is_file():
        raise UsageError(f"--sample_file={file} is not a file: pass the samples.jsonl of an evaluation")
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            lines = stream.read().split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RunError(
            f"--sample_file={file} cannot be read ({error}): pass the samples.jsonl of an evaluation"
        ) from error
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
            problem = "" if all(isinstance(sample[name], str) for name in ("task_id", "completion")) else "not text"
        except (ValueError, KeyError, TypeError) as error:
            problem = repr(error)
        if problem:
            raise UsageError(
                f"--sample_file={file}, line {number} is not a sample ({problem}): each line needs the texts task_id "
                "and completion"
            )
        samples.append(sample)
    if not samples:
        raise UsageError(f"--sample_file={file} has no samples: pass the samples.jsonl of an evaluation")
    return samples


def check_samples(
    samples: Sequence[dict[str, Any]], problems: dict[str, Any], file: Path, *, allow_missing: bool
) -> int:
    """Return the smallest number of samples of a problem.

    Raises UsageError: a problem is unknown, or one has no sample and ``allow_missing`` is False.
    """
    counts: dict[str, int] = {}
    for sample in samples:
        name = sample["task_id"]
        if name not in problems:
            near = nearest(name, problems).partition(" valid:")[0] if len(problems) > 8 else nearest(name, problems)
            raise UsageError(
                f"--sample_file={file} has a sample for {name!r}, which is not one of the {len(problems)} "
                f"problems: {near}"
            )
        counts[name] = counts.get(name, 0) + 1
    missing = [name for name in problems if name not in counts]
    if missing and not allow_missing:
        raise UsageError(
            f"--sample_file={file} has no sample for {len(missing)} of the {len(problems)} problems "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): add the samples, or pass "
            "--allow_missing to score only the other problems"
        )
    return min(counts.values())
