"""GLUE's and SuperGLUE's classification sets, on their validation splits, for heads and for models that generate text.

A head answers with its likeliest class. A model that generates text gets the prompt of training, and its completion
must be the word of a class; ``--first_token`` adds the published comparison of the words' first tokens.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lora_one.datasets import glue, super_glue
from lora_one.errors import UsageError, nearest
from lora_one.evaluation.benchmark import AnswerBenchmark
from lora_one.evaluation.decoding import Completion, Decoding
from lora_one.evaluation.glue_measures import MEASURES, Pairs, jackknife
from lora_one.evaluation.options import EvaluationOptions, option
from lora_one.evaluation.scoring import class_line
from lora_one.evaluation.shares import by_kind, counts_of, shares
from lora_one.evaluation.source import head_names
from lora_one.statistics.units import CORRELATION, Unit
from lora_one.types import Example

if TYPE_CHECKING:
    from lora_one.evaluation.engines.protocol import Engine

MAX_NEW_TOKENS = 16
MAX_LENGTH = 512
SETS = glue.TASKS | super_glue.TASKS
# names of the classes on the hub, which heads trained elsewhere have, where the word in the prompt is another one
HUB_NAMES = {
    "mrpc": {"not_equivalent": "different"},
    "qqp": {"not_duplicate": "different"},
    "copa": {"choice1": "choice 1", "choice2": "choice 2"},
}
UNREAD_BY_HEAD = {"first_token": False, "max_new_tokens": MAX_NEW_TOKENS}
UNREAD_BY_GENERATION = {"max_length": MAX_LENGTH}
KINDS = {"accuracy": "correct", "accuracy_first_token": "correct_first_token"}


def set_of(example_id: Any) -> str:
    """Return the set of an id ``<set>/<number>``."""
    return str(example_id).partition("/")[0]


def labels_of(example_id: Any) -> tuple[str, ...]:
    """Return the words of the classes of an example's set. Raises KeyError: not a set of GLUE or SuperGLUE."""
    return SETS[set_of(example_id)].labels


def validation_rows(data_path: str | None, dataset: str) -> list[Example]:
    """Return the validation split, with ids ``<set>/<number>``; the labels of the test splits are not public."""
    found = SETS[dataset].read_split(data_path, SETS[dataset].held_out)
    return [replace(example, id=f"{dataset}/{number}") for number, example in enumerate(found)]


@dataclass(frozen=True, kw_only=True)
class GlueOptions(EvaluationOptions):
    """Options of the sets of GLUE and SuperGLUE."""

    max_new_tokens: int = option(
        MAX_NEW_TOKENS, help="maximum number of new tokens per completion (%(default)s)", decides="completions"
    )
    dataset: str | None = option(None, help=f"one of {', '.join(SETS)}", decides="completions")
    first_token: bool = option(
        False, help="also compare the first tokens of the words, as published", decides="completions"
    )
    max_length: int = option(
        MAX_LENGTH,
        help="maximum length of an example for a classification head, in tokens (%(default)s)",
        decides="completions",
    )


def check_read(options: GlueOptions, *, head: bool) -> None:
    """Raise UsageError if an option is given that has no effect on this kind of model."""
    for name, default in (UNREAD_BY_HEAD if head else UNREAD_BY_GENERATION).items():
        if getattr(options, name) != default:
            reader = "a model that generates text" if head else "a classification head"
            raise UsageError(f"--{name}={getattr(options, name)} applies only to {reader}: leave it out")


class Glue(AnswerBenchmark[GlueOptions]):
    """One set of GLUE or SuperGLUE, on its validation split."""

    options = GlueOptions
    units: ClassVar[Mapping[str, Unit]] = {"matthews": CORRELATION}

    def check(self, options: GlueOptions) -> GlueOptions:
        """Fill in the words of the set's classes, in the order of the head's outputs.

        Raises UsageError: an unknown set, a value out of range, an option of sampling, or a head of another task.
        """
        if options.rescore:
            return options
        if options.dataset is None:
            raise UsageError(f"no set is chosen: pass --dataset=<name>, one of {', '.join(SETS)}")
        if options.dataset not in SETS:
            raise UsageError(
                f"--dataset={options.dataset} is not a set of GLUE or SuperGLUE: {nearest(options.dataset, SETS)}"
            )
        if options.temperature is not None:
            raise UsageError(
                f"--temperature={options.temperature} has no effect, because classes are not sampled: leave it out"
            )
        if options.max_length < 2:
            raise UsageError(f"--max_length={options.max_length} must be at least 2 tokens: pass a larger number")
        labels, names = SETS[options.dataset].labels, head_names(options)
        if names is not None:
            from lora_one.evaluation.class_choice import words_of

            hub = HUB_NAMES.get(options.dataset, {})
            labels = tuple(words_of([hub.get(name.lower(), name) for name in names], labels))
        return replace(options, labels=labels)

    def needs_model(self, options: GlueOptions) -> str | None:
        """Return what needs the model itself: a classification head."""
        return "a classification head" if head_names(options) is not None else None

    def takes_template(self, options: GlueOptions) -> bool:
        """Return whether the model generates text: a head reads texts without a prompt."""
        return head_names(options) is None

    def folder(self, task: str, options: GlueOptions) -> str:
        """Return a different folder for each set."""
        return f"{task}/{options.dataset}"

    def examples(self, options: GlueOptions) -> list[Example]:
        """Return the validation split of the set."""
        return validation_rows(options.data_path, options.dataset)

    def answers(
        self, engine: "Engine", examples: Sequence[Example], options: GlueOptions, done: Collection[int]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion): the word of the class that a head chooses, or the generated text."""
        from lora_one.evaluation.class_choice import by_first_token, by_head

        encoder, head = engine.encoder, engine.kind.has_head
        check_read(options, head=head)
        if head:
            for index, place, details in by_head(engine.loaded, encoder, examples, options.max_length, done):
                yield index, Completion(options.labels[place], details=details)
            return
        first = by_first_token(engine, examples, options.labels, done) if options.first_token else {}
        streams = [str(index) for index in range(len(examples))]
        prompts, decoding = encoder.prompts(examples), Decoding(options.max_new_tokens)
        for index, completion in engine.generate(prompts, decoding, streams, done):
            yield index, replace(completion, details=first.get(index, {}))

    def score(self, example_id: Any, prompt: str, completion: str, gold: str) -> dict[str, Any]:
        """Return one line of predictions.jsonl; a text that is not the word of one of the set's classes is unparsed.

        Raises KeyError: the id does not begin with the name of a set; ValueError: gold is not the word of a class.
        """
        return class_line(example_id, prompt, completion, gold, labels_of(example_id))

    def summarize(self, predictions: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
        """Return (metrics, counts): accuracy; as GLUE defines, also Matthews' coefficient of CoLA, F1 of MRPC and QQP.

        Standard errors are sqrt(p (1 - p) / n) for accuracy and those of the jackknife for the others.
        Raises UsageError: the lines belong to several sets.
        """
        names = sorted({set_of(line["id"]) for line in predictions})
        if len(names) > 1:
            raise UsageError(
                f"the predictions belong to several sets ({', '.join(names)}): score those of each set separately"
            )
        labels = labels_of(predictions[0]["id"])
        places = {word: place for place, word in enumerate(labels)}
        pairs: Pairs = Counter((places[line["gold"]], places.get(line["prediction"], -1)) for line in predictions)
        metrics = shares(by_kind(predictions, KINDS))
        for name, measure in MEASURES.get(names[0], {}).items():
            metrics |= {name: measure(pairs), f"{name}_stderr": jackknife(measure, pairs)}
        return metrics, counts_of(predictions)

    def remarks(self, predictions: Sequence[dict[str, Any]]) -> dict[str, int]:
        """Count the texts that were truncated for a head."""
        return {"texts_shortened": sum("shortened" in line for line in predictions)}
