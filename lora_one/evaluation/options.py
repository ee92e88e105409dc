"""Options of an evaluation: frozen records whose fields are the options of the command line.

A field made by ``option`` is an option of the command line; one made by ``filled_in`` is set by a benchmark's check.
``decides``: what the value determines, "completions" or "score"; None: only where results are written or how fast.
torch is not imported here, so --help and mistyped options are answered at once.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from lora_one.errors import UsageError
from lora_one.evaluation.engines import ENGINES, SERVER, TRANSFORMERS

Decides = Literal["completions", "score"]
Options = TypeVar("Options")
SERVER_OPTIONS = ("base_url", "served_model", "serve", "vllm", "concurrency", "request_timeout")


def true_or_false(text: str) -> bool:
    """Return the value of an option. Raises ValueError: it is neither true nor false."""
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    type: Callable[[str], Any] | None = None,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    spellings: Sequence[str] = (),
    decides: Decides | None = None,
) -> Any:
    """Return a dataclass field that is an option of the command line: ``--<name>``, and its other spellings.

    Without a default, the option is required. With the default False, it is a flag. ``type`` converts the text; the
    default is the type of the default value, or str if that is None.
    """
    argument: dict[str, Any] = {"help": help}
    if default is False:
        argument |= {"action": "store_true"}
    else:
        reader = type or (str if default in (None, dataclasses.MISSING) else default.__class__)
        argument |= {"type": reader, "choices": choices, "metavar": metavar}
    metadata = {"argument": argument, "spellings": tuple(spellings), "decides": decides}
    return dataclasses.field(default=default, metadata=metadata)


def filled_in(default: Any, *, decides: Decides | None = None) -> Any:
    """Return a dataclass field that is not an option of the command line; a benchmark's check sets it."""
    return dataclasses.field(default=default, metadata={"decides": decides})


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options that all benchmarks share."""

    model_name: str | None = option(
        None, help="merged checkpoint, another local folder, or a hub id (default: the base of --adapter)"
    )
    data_path: str | None = option(
        None, help="local file or folder instead of the hub's test split", decides="completions"
    )
    limit: int | None = option(
        None,
        type=int,
        help="evaluate only the first LIMIT examples (MMLU, MATH: those of the first subjects)",
        decides="completions",
    )
    adapter: str | None = option(
        None, help="adapter/ folder of a run, evaluated on --model_name without merging", decides="completions"
    )
    output_dir: str | None = option(
        None,
        help="default: eval/<task> in the run's folder (for its epochs/<n>: eval/epochs/<n>/<task>), "
        "else eval_results/<model>/<task>",
    )
    batch_size: int | None = option(
        None,
        type=int,
        help="prompts in a batch; it changes results by rounding at most (default: 16 on a CPU, else as many as fit)",
    )
    chat_template: bool | None = option(
        None,
        type=true_or_false,
        metavar="true|false",
        help="each prompt is one user turn of the tokenizer's chat template (default: as the evaluated run was "
        "trained)",
        decides="completions",
    )
    max_new_tokens: int = option(
        512, help="maximum number of new tokens per completion (%(default)s)", decides="completions"
    )
    temperature: float | None = option(
        None, type=float, help="sample with this temperature (default: greedy decoding)", decides="completions"
    )
    top_p: float | None = option(
        None,
        type=float,
        help="with --temperature: sample from the likeliest tokens with this total probability",
        decides="completions",
    )
    seed: int = option(0, help="seed of the sampling (%(default)s)", decides="completions")
    dtype: str = option(
        "auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="auto: the dtype of the checkpoint",
        decides="completions",
    )
    engine: str = option(
        TRANSFORMERS,
        choices=list(ENGINES),
        help="what runs the model: transformers in this process, or a server with OpenAI's completions API, such as "
        "vLLM's (%(default)s)",
        decides="completions",
    )
    base_url: str | None = option(
        None, metavar="URL", help="with --engine=server: its address, such as http://127.0.0.1:8000"
    )
    served_model: str | None = option(
        None, metavar="NAME", help="with --engine=server: the name of the model there (default: the only one)"
    )
    serve: bool = option(False, help="with --engine=server: start vLLM here, and stop it at the end")
    vllm: str | None = option(
        None,
        metavar="PATH",
        help="with --serve: an environment with vLLM, or its program bin/vllm (default: on PATH, or that of "
        "scripts/serve.sh)",
    )
    concurrency: int = option(32, help="with --engine=server: requests at a time (%(default)s)")
    request_timeout: float = option(600.0, help="with --engine=server: seconds that a request may take (%(default)s)")
    no_parity: bool = option(
        False, help="with another engine: leave out the comparison of a few prompts with transformers"
    )
    device: str | None = option(None, help="cuda, cuda:1, mps or cpu (default: the accelerator if there is one)")
    wandb_name: str | None = option(
        None, help="name of the W&B run (default with --wandb_mode: name of the evaluated run, and the task)"
    )
    wandb_mode: str | None = option(
        None,
        choices=["online", "offline", "disabled"],
        help="log a W&B run in the group of the evaluated run (default: offline with --wandb_name, else no run)",
    )
    rescore: str | None = option(
        None, metavar="PREDICTIONS", help="score the completions of this predictions.jsonl again, without a model"
    )
    overwrite: bool = option(False, help="replace other results in --output_dir")
    num_sample: int = filled_in(1)
    no_score: bool = filled_in(False)
    stop: tuple[str, ...] = filled_in(())  # a completion ends before the first of these texts
    labels: tuple[str, ...] | None = filled_in(None)  # words of the classes, for a model with a classification head

    @property
    def model(self) -> str:
        """Return the name of the evaluated model for metrics.json."""
        return self.model_name or self.adapter or f"completions of {self.rescore}"

    def deciding(self, what: Decides) -> dict[str, Any]:
        """Return the options that determine the completions or the score, with their values."""
        return {field.name: getattr(self, field.name) for field in fields_deciding(type(self), what)}

    @property
    def settings(self) -> dict[str, Any]:
        """Return the options that determine the results, for metrics.json; with --rescore, only those of the score."""
        return ({} if self.rescore else self.deciding("completions")) | self.deciding("score")


def fields_deciding(options: type, what: Decides) -> list[dataclasses.Field[Any]]:
    """Return the fields of a class of options that determine the completions or the score."""
    return [field for field in dataclasses.fields(options) if field.metadata.get("decides") == what]


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add every field made by ``option`` to the parser."""
    for field in dataclasses.fields(options):
        if "argument" in field.metadata:
            given = field.default
            rest = {"required": True} if given is dataclasses.MISSING else {"default": given}
            names = [f"--{field.name}", *field.metadata["spellings"]]
            parser.add_argument(*names, dest=field.name, **field.metadata["argument"], **rest)


def parsed(parser: argparse.ArgumentParser, options: type[Options], arguments: Sequence[str]) -> Options:
    """Return the options of a command line as an instance of this class."""
    return options(**vars(parser.parse_args(arguments)))


def check_options(options: EvaluationOptions) -> None:
    """Check the shared options before anything is loaded. Raises UsageError: a value is not allowed."""
    if not (options.model_name or options.adapter or options.rescore):
        raise UsageError(
            "there is nothing to evaluate: pass --model_name=<folder or hub id>, --adapter=<folder>, or "
            "--rescore=<predictions.jsonl>"
        )
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value} must be at least 1: pass a larger number or leave it out")
    if options.temperature is not None and not (0 < options.temperature < math.inf):
        raise UsageError(
            f"--temperature={options.temperature} must be a positive number: leave it out for greedy decoding"
        )
    if options.top_p is not None and not options.temperature:
        raise UsageError(f"--top_p={options.top_p} needs --temperature: add it, or leave --top_p out")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise UsageError(f"--top_p={options.top_p} must be greater than 0 and at most 1: pass another number")
    for name in ("adapter", "data_path", "rescore"):
        check_path(name, getattr(options, name))
    if options.rescore:
        check_rescored(options)
    check_engine(options)


def check_engine(options: EvaluationOptions) -> None:
    """Check the options of the engine. Raises UsageError: an option without effect or missing, or a wrong value."""
    defaults = EvaluationOptions()
    if options.no_parity and options.engine == TRANSFORMERS:
        raise UsageError(f"--no_parity has no effect with --engine={TRANSFORMERS}: leave it out")
    if options.engine != SERVER:
        for name in SERVER_OPTIONS:
            if getattr(options, name) != getattr(defaults, name):
                raise UsageError(f"--{name} has no effect without --engine={SERVER}: add it, or leave --{name} out")
        return
    if options.rescore:
        return
    if options.base_url and options.serve:
        raise UsageError(f"--base_url={options.base_url} and --serve exclude each other: leave one of them out")
    if not (options.base_url or options.serve):
        raise UsageError(
            f"--engine={SERVER} needs either --base_url=<address of a running server> or --serve, which starts vLLM"
        )
    if options.vllm is not None and not options.serve:
        raise UsageError(f"--vllm={options.vllm} has no effect without --serve: add it, or leave --vllm out")
    if options.adapter is not None and not options.serve:
        raise UsageError(
            f"--adapter={options.adapter} cannot be put on a model that a server has loaded: merge it and serve the "
            "merged checkpoint, or pass --serve instead of --base_url, which merges it"
        )
    if options.concurrency < 1:
        raise UsageError(f"--concurrency={options.concurrency} must be at least 1: pass a larger number")
    if not 0 < options.request_timeout < math.inf:
        raise UsageError(f"--request_timeout={options.request_timeout} must be a positive number of seconds")


def check_path(name: str, value: str | None) -> None:
    """Raise UsageError if the path of an option does not exist."""
    if value is not None and not Path(value).expanduser().exists():
        raise UsageError(f"--{name}={value} does not exist (the working folder is {Path.cwd()}): pass an existing path")


def check_rescored(options: EvaluationOptions) -> None:
    """Raise UsageError if --rescore is not a file, or is given with an option of generation."""
    for field in fields_deciding(type(options), "completions"):
        if getattr(options, field.name) not in (None, field.default):
            raise UsageError(
                f"--{field.name} has no effect with --rescore, which scores saved completions: leave it out"
            )
    if not Path(options.rescore or "").expanduser().is_file():
        raise UsageError(f"--rescore={options.rescore} is not a file: pass the predictions.jsonl of an evaluation")
