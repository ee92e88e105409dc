"""HumanEval: functions written from their docstring, run against their tests; pass@k.

Protocol of the published script: its prompt, its post-processing, 512 new tokens; what comes out is a whole
function, which is appended to the problem's own prompt and run in the sandbox.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import comb, sqrt
from pathlib import Path
from typing import Any

from lora_one.datasets.questions import HUMANEVAL as SOURCE
from lora_one.datasets.sources import read_rows
from lora_one.errors import UsageError
from lora_one.evaluation.benchmark import Benchmark, Prediction
from lora_one.evaluation.options import EvaluationOptions, option
from lora_one.evaluation.output import write_lines
from lora_one.evaluation.sandbox import Limits, Program, check_isolation, cores, run_programs
from lora_one.types import Example

COLUMNS = ("task_id", "prompt", "entry_point", "test")
USUAL_K = (1, 10, 100)
SAMPLING = {"temperature": 0.8, "top_p": 0.95}  # of several samples, where nothing else is asked for
# The published prompt, to the letter: the space after the first line break and the one after "code:" included.
PROMPT = """Below is an instruction that describes a task.
 Write a response that appropriately completes the request.

### Instruction:
Complete the following Python code:\x20
Notes: respond with the entire complete function definition
do not add any comments, be as concise in your code as possible
use only built-in libraries, assume no additional imports other than those provided (if any)
use `    ` (4 spaces) for each level of indentation

code:
```python
{problem}
```

### Response:
```python
"""
TRIPLE_QUOTED = re.compile(r'""".*?"""' + r"|'''.*?'''", re.DOTALL)
UNPARSED = ("failed: SyntaxError", "failed: IndentationError", "failed: TabError")


def problems(data_path: str | None) -> dict[str, dict[str, str]]:
    """Return the 164 problems by task_id, of the hub or of a local file. Raises UsageError: a task_id occurs twice."""
    found: dict[str, dict[str, str]] = {}
    for row in read_rows(SOURCE, data_path, "test", COLUMNS):
        if row["task_id"] in found:
            raise UsageError(f"{data_path or SOURCE[0]} holds task_id {row['task_id']} twice: give each its own")
        found[row["task_id"]] = row
    return found


def program_text(completion: str) -> str:
    """Return the function in a completion, as the published script reads it.

    Fences go, tabs become four spaces, triple-quoted strings go, blank lines go. Then the indentation is made anew:
    the first line with "def" in it and what is no deeper stand at the margin; each further width that occurs is one
    level of four spaces.

    >>> program_text("  def f(x):\\n    return x\\n```")
    'def f(x):\\n    return x'
    """
    text = TRIPLE_QUOTED.sub("", completion.replace("```", "").replace("\t", "    "))
    lines = [line for line in text.splitlines() if line.strip()]
    widths = [len(line) - len(line.lstrip(" ")) for line in lines]
    margin = next((width for line, width in zip(lines, widths, strict=True) if "def" in line), 0)
    deeper = sorted({width for width in widths if width > margin})
    levels = {width: level for level, width in enumerate(deeper, start=1)}
    return "\n".join("    " * levels.get(width, 0) + line.strip() for line, width in zip(lines, widths, strict=True))


@dataclass(frozen=True, kw_only=True)
class SandboxOptions:
    """How programs are run."""

    timeout: float = option(
        Limits.seconds, type=float, help="seconds a program may take (%(default)s)", decides="score"
    )
    memory_mb: int = option(Limits.memory_bytes >> 20, help="of each of its processes (%(default)s)", decides="score")
    workers: int = option(cores(), spellings=["--n_workers"], help="programs at a time (the cores: %(default)s)")
    unsafe: bool = option(
        False, help="run programs without isolation, with your files, network and rights", decides="score"
    )


def program_of(problem: dict[str, str], completion: str) -> Program:
    return Program(problem["prompt"], completion, problem["test"], problem["entry_point"])


def results_of(programs: Sequence[Program], options: SandboxOptions) -> list[str]:
    """Return ``passed``, ``timed out`` or ``failed: <why>`` of each program, in order."""
    from tqdm import tqdm

    results = [""] * len(programs)
    passed = 0
    with tqdm(total=len(programs), desc="programs", unit="prog") as bar:
        for index, result in run_programs(programs, limits_of(options), workers=options.workers, unsafe=options.unsafe):
            results[index] = result
            passed += result == "passed"
            bar.update()
            bar.set_postfix(passed=passed, refresh=False)
    return results


def counts_of(results: Sequence[str]) -> dict[str, int]:
    """Count the programs that are correct, wrong (timeouts included) and unparsed (not valid Python)."""
    correct = sum(result == "passed" for result in results)
    unparsed = sum(result.startswith(UNPARSED) for result in results)
    wrong = len(results) - correct - unparsed
    return {"correct": correct, "wrong": wrong, "unparsed": unparsed, "total": len(results)}


def pass_at(outcomes: Iterable[Sequence[bool]], ks: Sequence[int]) -> dict[str, float]:
    """pass@k over problems, each given by whether its samples passed, with standard errors.

    The unbiased estimate of a problem with c of n samples right is 1 - C(n - c, k) / C(n, k), arXiv:2107.03374; the
    standard error is that of the mean over problems, sd / sqrt(problems): for one sample sqrt(p (1 - p) / problems).
    """
    counts = [(len(passed), sum(passed)) for passed in outcomes]
    metrics = {}
    for k in ks:
        estimates = [1 - comb(n - c, k) / comb(n, k) for n, c in counts]
        mean = sum(estimates) / len(estimates)
        variance = sum((estimate - mean) ** 2 for estimate in estimates) / len(estimates)
        metrics |= {f"pass@{k}": mean, f"pass@{k}_stderr": sqrt(variance / len(estimates))}
    return metrics


def check_sandbox(options: SandboxOptions) -> None:
    """Raises UsageError: a value out of range; RunError: programs cannot be isolated here."""
    if not 0 < options.timeout <= 3600:
        raise UsageError(f"--timeout={options.timeout} must lie in (0, 3600] seconds: 3 is the published limit")
    if options.memory_mb < 64:
        raise UsageError(f"--memory_mb={options.memory_mb} must be at least 64: the interpreter itself needs that")
    if options.workers < 1:
        raise UsageError(f"--workers={options.workers} must be at least 1: leave it out for one a core")
    if not options.unsafe:
        check_isolation(limits_of(options))


def limits_of(options: SandboxOptions) -> Limits:
    return Limits(seconds=options.timeout, memory_bytes=options.memory_mb << 20)


@dataclass(frozen=True, kw_only=True)
class HumanEvalOptions(SandboxOptions, EvaluationOptions):
    """Options of HumanEval."""

    num_sample: int = option(
        1,
        help="completions per problem; several are sampled, at temperature 0.8, top_p 0.95 unless given (%(default)s)",
        decides="completions",
    )
    no_score: bool = option(False, help="only generate; run nothing")


class HumanEval(Benchmark[HumanEvalOptions]):
    """HumanEval, all 164 problems."""

    options = HumanEvalOptions

    def check(self, options: HumanEvalOptions) -> HumanEvalOptions:
        """Fill in the sampling of several samples.

        Raises UsageError: a value out of range; RunError: programs cannot be isolated here.
        """
        if options.num_sample < 1:
            raise UsageError(
                f"--num_sample={options.num_sample} must be at least 1: give a larger number or leave it out"
            )
        if options.num_sample > 1 and options.temperature is None:
            options = replace(options, **SAMPLING)
        if options.no_score and options.rescore:
            raise UsageError("--no_score and --rescore leave nothing to do: drop one of them")
        if not options.no_score:
            check_sandbox(options)
        return options

    def examples(self, options: HumanEvalOptions) -> list[Example]:
        """Return the problems in the published prompt; ``gold`` holds what the tests need."""
        rows = problems(options.data_path).values()
        return [Example(PROMPT.format(problem=row["prompt"]), "", row) for row in rows]

    def score(self, example_id: Any, prompt: str, completion: str, gold: dict[str, str]) -> dict[str, Any]:
        """Return one line of predictions.jsonl; ``correct`` is None until judge has run the programs.

        Raises KeyError, TypeError: gold is not a problem.
        """
        problem = {column: gold[column] for column in COLUMNS}
        if not all(isinstance(text, str) for text in problem.values()):
            raise TypeError("the problem holds a value that is not text")
        return {
            "id": example_id,
            "prompt": prompt,
            "completion": completion,
            "prediction": program_text(completion),
            "gold": problem,
            "correct": None,
        }

    def judge(self, predictions: Sequence[Prediction], options: HumanEvalOptions, output: Path) -> list[Prediction]:
        """Write samples.jsonl, then run the programs (unless --no_score): fill in ``correct`` and ``result``."""
        samples = [{"task_id": line["gold"]["task_id"], "completion": line["prediction"]} for line in predictions]
        output.mkdir(parents=True, exist_ok=True)
        write_lines(output / "samples.jsonl", samples)
        if options.no_score:
            return list(predictions)
        programs = [program_of(line["gold"], line["prediction"]) for line in predictions]
        results = results_of(programs, options)
        return [
            line | {"correct": result == "passed", "result": result}
            for line, result in zip(predictions, results, strict=True)
        ]

    def summarize(self, predictions: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
        """(metrics, counts): pass@k for k in 1, 10, 100 and n, as far as n samples go; counts of programs."""
        outcomes: dict[Any, list[bool]] = {}
        for line in predictions:
            outcomes.setdefault(line["id"], []).append(line["correct"])
        fewest = min(map(len, outcomes.values()))
        metrics = pass_at(outcomes.values(), sorted({*(k for k in USUAL_K if k <= fewest), fewest}))
        return metrics, counts_of([line["result"] for line in predictions])
