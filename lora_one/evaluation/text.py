"""The loss of a causal model on any text, in nats per token and in bits per byte, for example to measure forgetting.

A document is a whole text file, a row of a table, or prompt and response of an example of a data set. Its tokens are
cut into windows of --max_length tokens that do not overlap. Each window is read after BOS, or after EOS if the
tokenizer has no BOS, so every token is scored once. With N nats on a text of b bytes in UTF-8, bits per byte are
N / (b ln 2); they can be compared between tokenizers, nats per token cannot.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_one.config.defaults import dataset_settings
from lora_one.datasets import DATASETS
from lora_one.datasets.own import LocalConfig
from lora_one.datasets.sources import as_text, local_rows
from lora_one.datasets.tables import format_of, read_text
from lora_one.errors import RunError, UsageError, nearest
from lora_one.evaluation.benchmark import AnswerBenchmark
from lora_one.evaluation.decoding import Completion
from lora_one.evaluation.options import EvaluationOptions, filled_in, option
from lora_one.statistics.means import weighted_mean
from lora_one.statistics.units import BITS, NATS, Unit
from lora_one.types import Example

if TYPE_CHECKING:
    from lora_one.evaluation.engines.protocol import Engine

COLUMN = "text"  # with the documents of a table, by default
MAX_LENGTH = 2048  # of a window by default, where the model's context is longer
GROUP = 64  # windows, at least, whose batches are made together


def documents_of(options: "TextOptions") -> list[str]:
    """Return the documents of --dataset, of a table's --column, or of a text file.

    Raises UsageError: there is no such column; RunError: a file cannot be read.
    """
    if options.dataset is not None:
        dataset, config = DATASETS[options.dataset], dataset_settings(options.dataset, options.data_path)
        return [text_of(example) for example in (dataset.validation or dataset.train)(config)]
    path = Path(options.data_path).expanduser()
    if path.is_file() and format_of(path) is None:
        return [read_text(path)]
    rows = local_rows(path, "test")
    names = list(dict.fromkeys(name for row in rows for name in row))
    column = options.column or COLUMN
    if column not in names:
        raise UsageError(f"{options.data_path} has no column {column}; pass --column=<name>: {nearest(column, names)}")
    return [as_text(row.get(column), column, options.data_path) for row in rows]


def text_of(example: Example) -> str:
    """Return an example as one text: the response directly after the prompt, the turns of a conversation on lines."""
    if example.messages:
        return "\n".join(text for _, text in example.messages)
    return example.prompt + example.response


def losses_of(
    engine: "Engine", texts: Sequence[str], max_length: int, done: Collection[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (index, the fields of its line) of each text that is not in ``done``; see ``line_of``.

    With several processes, each one scores its share of the windows and yields its share of the texts.
    Raises UsageError: not a causal model, or the tokenizer has neither BOS nor EOS.
    """
    from lora_one.distributed import Processes
    from lora_one.evaluation.choices import Question

    start, processes = first_token(engine.tokenizer), Processes.current()
    tokens = engine.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    windows = [[ids[place : place + max_length] for place in range(0, len(ids), max_length)] for ids in tokens]
    for group in groups_of(windows):
        if all(index in done for index in group):
            continue
        owners = [index for index in group for _ in windows[index]]
        questions = [Question([start], [window]) for index in group for window in windows[index]]
        known = {place for place, index in enumerate(owners) if index in done}
        scored = dict(engine.log_likelihoods(questions, known, long=True))
        nats = {place: -value for part in processes.gathered(scored) for place, (value,) in part.items()}
        for index in group[processes.rank :: processes.count]:
            if index not in done:
                own = [nats[place] for place, owner in enumerate(owners) if owner == index]
                yield index, line_of(texts[index], [len(window) for window in windows[index]], own)


def first_token(tokenizer: Any) -> int:
    """Return the token before each window: BOS, else EOS. Raises UsageError: the tokenizer has neither."""
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise UsageError(
            "the model's tokenizer has neither a BOS nor an EOS token, so nothing predicts the first token of a text: "
            "set one of them in its tokenizer_config.json"
        )
    return token


def groups_of(windows: Sequence[Sequence[Any]]) -> Iterator[list[int]]:
    """Yield the indices of the documents, those with the most tokens first, in groups of at least GROUP windows.

    windows: those of each document.
    """
    group: list[int] = []
    for index in sorted(range(len(windows)), key=lambda index: -sum(map(len, windows[index]))):
        group.append(index)
        if sum(len(windows[member]) for member in group) >= GROUP:
            yield group
            group = []
    if group:
        yield group


def line_of(text: str, tokens: Sequence[int], nats: Sequence[float]) -> dict[str, Any]:
    """Return the fields of a document in predictions.jsonl: its mean loss (None: it is empty), sizes, and windows.

    tokens, nats: of each window.
    """
    total = sum(tokens)
    return {
        "loss": sum(nats) / total if total else None,
        "tokens": total,
        "bytes": len(text.encode()),
        "windows": [{"loss": loss / count, "tokens": count} for loss, count in zip(nats, tokens, strict=True)],
    }


@dataclass(frozen=True, kw_only=True)
class TextOptions(EvaluationOptions):
    """Options of the loss on a text; those of generated text do not exist."""

    data_path: str | None = option(
        None,
        help="a text file, or a table (.jsonl, .json, .csv, .tsv, .parquet) with a document in each row; with "
        "--dataset: its local file or folder instead of the hub",
        decides="completions",
    )
    column: str | None = option(
        None, help=f"column of the table with the documents (default: {COLUMN})", decides="completions"
    )
    dataset: str | None = option(
        None,
        help="a data set of run_exp.py; a document is an example of its validation split, or of training if it has "
        "none",
        decides="completions",
    )
    max_length: int | None = option(
        None,
        type=int,
        help=f"tokens of a window (default: the model's context, at most {MAX_LENGTH})",
        decides="completions",
    )
    max_new_tokens: int | None = filled_in(None)
    temperature: float | None = filled_in(None)
    top_p: float | None = filled_in(None)
    seed: int = filled_in(0)
    rescore: str | None = filled_in(None)


class Text(AnswerBenchmark[TextOptions]):
    """The loss on any text."""

    options = TextOptions
    units: ClassVar[Mapping[str, Unit]] = {"loss": NATS, "bits_per_byte": BITS}

    def check(self, options: TextOptions) -> TextOptions:
        """Check the options. Raises UsageError: no text, an unknown data set, or a value out of range."""
        if options.dataset is None and options.data_path is None:
            raise UsageError(
                "there is no text: pass --data_path=<text file, or table with --column=<name>>, or --dataset=<name>"
            )
        if options.dataset is not None:
            if options.dataset not in DATASETS:
                raise UsageError(f"--dataset={options.dataset} is not a data set: {nearest(options.dataset, DATASETS)}")
            if options.data_path is None and issubclass(DATASETS[options.dataset].settings, LocalConfig):
                raise UsageError(f"--dataset={options.dataset} needs a local file: add --data_path=<file.jsonl>")
            if options.column is not None:
                raise UsageError(f"--column={options.column} has no effect with --dataset: leave one of them out")
        if options.max_length is not None and options.max_length < 1:
            raise UsageError(f"--max_length={options.max_length} must be at least 1: pass a larger number")
        return options

    def takes_template(self, options: TextOptions) -> bool:
        """Return False: the text itself is measured."""
        return False

    def folder(self, task: str, options: TextOptions) -> str:
        """Return a different folder for each data set or file."""
        return f"{task}/{options.dataset or Path(options.data_path).name.partition('.')[0]}"

    def examples(self, options: TextOptions) -> list[Example]:
        """Return the documents, as prompts without a response. Raises RunError: all are empty."""
        found = [Example(text, "") for text in documents_of(options)]
        if not any(example.prompt for example in found):
            raise RunError(f"{options.data_path or options.dataset} contains no text: pass another file")
        return found

    def answers(
        self, engine: "Engine", examples: Sequence[Example], options: TextOptions, done: Collection[int]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, the loss in the details). Raises UsageError: windows exceed the model's context."""
        context = engine.context
        if options.max_length is not None and options.max_length > context:
            raise UsageError(
                f"--max_length={options.max_length} exceeds the model's context of {context} tokens: pass a smaller "
                "number or leave it out"
            )
        texts, length = [example.prompt for example in examples], options.max_length or min(context, MAX_LENGTH)
        for index, details in losses_of(engine, texts, length, done):
            yield index, Completion("", details=details)

    def score(self, example_id: Any, prompt: str, completion: str, gold: Any) -> dict[str, Any]:
        """Return the number of the document; there is no answer to score."""
        return {"id": example_id}

    def summarize(self, predictions: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
        """Return (metrics, counts): the loss of all tokens, and bits per byte.

        Standard errors are those of a ratio of two sums over documents, for one document over its windows (whose bytes
        are taken as proportional to their tokens); a single window has none.
        Raises RunError: no document has a token.
        """
        lines = [line for line in predictions if line["tokens"]]
        if not lines:
            raise RunError(f"none of the {len(predictions)} documents has a token: raise --limit, or pass another text")
        parts = [(line["loss"] * line["tokens"], line["tokens"], line["bytes"]) for line in lines]
        if len(lines) == 1:
            per_token = lines[0]["bytes"] / lines[0]["tokens"]
            sizes = [(window["loss"], window["tokens"]) for window in lines[0]["windows"]]
            parts = [(loss * tokens, tokens, tokens * per_token) for loss, tokens in sizes]
        nats, tokens, sizes = zip(*parts, strict=True)
        metrics: dict[str, float] = {}
        for name, weights in (("loss", tokens), ("bits_per_byte", [log(2) * size for size in sizes])):
            values = [total / weight for total, weight in zip(nats, weights, strict=True)]
            metrics[name], error = weighted_mean(values, weights)
            metrics |= {} if error is None else {f"{name}_stderr": error}
        counts = {"documents": len(predictions), "windows": sum(len(line["windows"]) for line in lines)}
        return metrics, counts | {name: sum(line[name] for line in lines) for name in ("tokens", "bytes")}

    def remarks(self, predictions: Sequence[dict[str, Any]]) -> dict[str, int]:
        """Count the documents without a token, if there are any."""
        empty = sum(not line["tokens"] for line in predictions)
        return {"empty": empty} if empty else {}
