"""HumanEval: the model writes a function from its docstring, and tests are run on it; the metric is pass@k.

Protocol of the published script: its prompt, its post-processing, 512 new tokens. The completion is a whole function;
it is appended to the problem's prompt and run in the sandbox.
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
from lora_one.evaluation.scoring import prediction_line
from lora_one.progress import progress
from lora_one.types import Example

COLUMNS = ("task_id", "prompt", "entry_point", "test")
USUAL_K = (1, 10, 100)
SAMPLING = {"temperature": 0.8, "top_p": 0.95}  # defaults for several samples
# The exact published prompt, including the space after the first line break and the one after "code:"
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
    """Return task_id -> problem, from the hub or a local file. Raises UsageError: a task_id occurs twice."""
    found: dict[str, dict[str, str]] = {}
    for row in read_rows(SOURCE, data_path, "test", COLUMNS):
        if row["task_id"] in found:
            raise UsageError(
                f"{data_path or SOURCE[0]} contains the task_id {row['task_id']} twice: pass a file with a different "
                "task_id for each problem"
            )
        found[row["task_id"]] = row
    return found


def program_text(completion: str) -> str:
    """Return the function in a completion, extracted as in the published script.

    Fences, triple-quoted strings and blank lines are removed, and tabs are replaced by four spaces. Then the
    indentation is set anew: the first line that contains "def" and all lines that are not indented more get none; each
    larger indentation that occurs becomes one more level of four spaces.

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
    """Options for running programs."""

    timeout: float = option(
        Limits.seconds, type=float, help="time limit of a program in seconds (%(default)s)", decides="score"
    )
    memory_mb: int = option(
        Limits.memory_bytes >> 20,
        help="memory limit of each process of a program, in MiB (%(default)s)",
        decides="score",
    )
    workers: int = option(
        cores(), spellings=["--n_workers"], help="programs that run at a time (default: one per core, %(default)s)"
    )
    unsafe: bool = option(
        False, help="run programs without isolation, with your permissions, files and network", decides="score"
    )


def program_of(problem: dict[str, str], completion: str) -> Program:
    return Program(problem["prompt"], completion, problem["test"], problem["entry_point"])


def results_of(programs: Sequence[Program], options: SandboxOptions) -> list[str]:
    """Run the programs; return ``passed``, ``timed out`` or ``failed: <reason>`` for each, in order."""
    results = [""] * len(programs)
    passed = 0
    with progress("programs", len(programs), "programs") as shown:
        for index, result in run_programs(programs, limits_of(options), workers=options.workers, unsafe=options.unsafe):
            results[index] = result
            passed += result == "passed"
            shown.advance(passed=str(passed))
    return results


def counts_of(results: Sequence[str]) -> dict[str, int]:
    """Count the programs that are correct, wrong (timeouts included) and unparsed (not valid Python)."""
    correct = sum(result == "passed" for result in results)
    unparsed = sum(result.startswith(UNPARSED) for result in results)
    wrong = len(results) - correct - unparsed
    return {"correct": correct, "wrong": wrong, "unparsed": unparsed, "total": len(results)}


def pass_at(outcomes: Iterable[Sequence[bool]], ks: Sequence[int]) -> dict[str, float]:
    """Return pass@k for each k, averaged over problems, with its standard error.

    outcomes: for each problem, whether each of its samples passed. The unbiased estimate for a problem with c of n
    samples passed is 1 - C(n - c, k) / C(n, k), arXiv:2107.03374. The standard error is sd / sqrt(problems), which for
    one sample is sqrt(p (1 - p) / problems).
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
    """Check the options. Raises UsageError: a value out of range; RunError: programs cannot be isolated here."""
    if not 0 < options.timeout <= 3600:
        raise UsageError(
            f"--timeout={options.timeout} must be greater than 0 and at most 3600 seconds: the published limit is 3"
        )
    if options.memory_mb < 64:
        raise UsageError(
            f"--memory_mb={options.memory_mb} must be at least 64, which the interpreter needs: pass a larger number"
        )
    if options.workers < 1:
        raise UsageError(
            f"--workers={options.workers} must be at least 1: pass a larger number, or leave it out for one per core"
        )
    if not options.unsafe:
        check_isolation(limits_of(options))


def limits_of(options: SandboxOptions) -> Limits:
    return Limits(seconds=options.timeout, memory_bytes=options.memory_mb << 20)


@dataclass(frozen=True, kw_only=True)
class HumanEvalOptions(SandboxOptions, EvaluationOptions):
    """Options of HumanEval."""

    num_sample: int = option(
        1,
        help="completions per problem; more than one are sampled, by default with temperature 0.8 and top_p 0.95 "
        "(%(default)s)",
        decides="completions",
    )
    no_score: bool = option(False, help="only generate completions, without running the programs")


class HumanEval(Benchmark[HumanEvalOptions]):
    """HumanEval, all 164 problems."""

    options = HumanEvalOptions

    def check(self, options: HumanEvalOptions) -> HumanEvalOptions:
        """Fill in the sampling settings if there are several samples.

        Raises UsageError: a value out of range; RunError: programs cannot be isolated here.
        """
        if options.num_sample < 1:
            raise UsageError(
                f"--num_sample={options.num_sample} must be at least 1: pass a larger number or leave it out"
            )
        if options.num_sample > 1 and options.temperature is None:
            options = replace(options, **SAMPLING)
        if options.no_score and options.rescore:
            raise UsageError("--no_score and --rescore exclude each other: drop one of them")
        if not options.no_score:
            check_sandbox(options)
        return options

    def takes_template(self, options: HumanEvalOptions) -> bool:
        """Return False: the prompt begins the answer, with a fence of code, which a turn of the user cannot do."""
        return False

    def examples(self, options: HumanEvalOptions) -> list[Example]:
        """Return the problems in the published prompt; ``gold`` is the problem with its tests."""
        rows = problems(options.data_path).values()
        return [Example(PROMPT.format(problem=row["prompt"]), "", row) for row in rows]

    def score(self, example_id: Any, prompt: str, completion: str, gold: dict[str, str]) -> dict[str, Any]:
        """Return one line of predictions.jsonl; ``correct`` is None until judge has run the programs.

        Raises KeyError, TypeError: gold is not a problem.
        """
        problem = {column: gold[column] for column in COLUMNS}
        if not all(isinstance(text, str) for text in problem.values()):
            raise TypeError("a field of the problem is not text")
        return prediction_line(example_id, prompt, completion, problem, program_text(completion), correct=None)

    def judge(self, predictions: Sequence[Prediction], options: HumanEvalOptions, output: Path) -> list[Prediction]:
        """Write samples.jsonl and, unless --no_score, run the programs and fill in ``correct`` and ``result``."""
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
        """Return (metrics, counts): pass@n for n samples per problem and pass@k for k in 1, 10, 100 up to n."""
        outcomes: dict[Any, list[bool]] = {}
        for line in predictions:
            outcomes.setdefault(line["id"], []).append(line["correct"])
        fewest = min(map(len, outcomes.values()))
        metrics = pass_at(outcomes.values(), sorted({*(k for k in USUAL_K if k <= fewest), fewest}))
        return metrics, counts_of([line["result"] for line in predictions])
