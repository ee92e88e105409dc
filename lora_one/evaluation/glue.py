"""GLUE's and SuperGLUE's classification sets, on their validation splits: by a head, or by the word a model writes.

A head answers with its likeliest class. A model that writes text is asked as in training, and what it writes must be
the word of a class; ``--first_token`` adds the published comparison of the words' first tokens.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_one.datasets import glue, super_glue
from lora_one.errors import UsageError, nearest
from lora_one.evaluation.benchmark import ModelBenchmark
from lora_one.evaluation.glue_measures import MEASURES, Pairs, jackknife
from lora_one.evaluation.options import EvaluationOptions, option
from lora_one.evaluation.shares import by_kind, counts_of, shares
from lora_one.types import Example

if TYPE_CHECKING:
    from lora_one.evaluation.generate import Completion
    from lora_one.evaluation.loading import LoadedModel

MAX_NEW_TOKENS = 16
MAX_LENGTH = 512
SETS = glue.TASKS | super_glue.TASKS
UNREAD_BY_HEAD = {"first_token": False, "max_new_tokens": MAX_NEW_TOKENS}
UNREAD_BY_WRITER = {"max_length": MAX_LENGTH}
KINDS = {"accuracy": "correct", "accuracy_first_token": "correct_first_token"}


def set_of(example_id: Any) -> str:
    """Return the set of an id ``<set>/<number>``."""
    return str(example_id).partition("/")[0]


def labels_of(example_id: Any) -> tuple[str, ...]:
    """Return the words of the classes of an example's set."""
    return SETS[set_of(example_id)].labels


def validation_rows(data_path: str | None, dataset: str) -> list[Example]:
    """Return the validation split, with ids ``<set>/<number>``: the labels of the test splits are not public."""
    found = SETS[dataset].read_split(data_path, SETS[dataset].held_out)
    return [replace(example, id=f"{dataset}/{number}") for number, example in enumerate(found)]


@dataclass(frozen=True, kw_only=True)
class GlueOptions(EvaluationOptions):
    """Options of the GLUE and SuperGLUE sets."""

    max_new_tokens: int = option(MAX_NEW_TOKENS, help="per completion (%(default)s)", decides="completions")
    dataset: str | None = option(None, help=f"one of {', '.join(SETS)}", decides="completions")
    first_token: bool = option(
        False, help="also compare the first tokens of the words, as published", decides="completions"
    )
    max_length: int = option(MAX_LENGTH, help="tokens a head reads of an example (%(default)s)", decides="completions")


def check_read(options: GlueOptions, *, head: bool) -> None:
    """Raise UsageError: an option is given that this kind of model does not read."""
    for name, default in (UNREAD_BY_HEAD if head else UNREAD_BY_WRITER).items():
        if getattr(options, name) != default:
            reader = "a model that generates text" if head else "a classification head"
            raise UsageError(f"--{name}={getattr(options, name)} applies only to {reader}: leave it out")


class Glue(ModelBenchmark[GlueOptions]):
    """One set of GLUE or SuperGLUE, on its validation split."""

    options = GlueOptions

    def check(self, options: GlueOptions) -> GlueOptions:
        """Fill in the words of the set's classes.

        Raises UsageError: not a set, a value out of range, or an option of sampling.
        """
        if options.rescore:
            return options
        if options.dataset is None:
            raise UsageError(f"no set is named: give --dataset=<one of {', '.join(SETS)}>")
        if options.dataset not in SETS:
            raise UsageError(
                f"--dataset={options.dataset} is not a set of GLUE or SuperGLUE: {nearest(options.dataset, SETS)}"
            )
        if options.temperature is not None:
            raise UsageError(
                f"--temperature={options.temperature} is not read here: a class is not sampled; leave it out"
            )
        if options.max_length < 2:
            raise UsageError(f"--max_length={options.max_length} must be at least 2 tokens: give a larger number")
        return replace(options, labels=SETS[options.dataset].labels)

    def folder(self, task: str, options: GlueOptions) -> str:
        """Return a folder for each set."""
        return f"{task}/{options.dataset}"

    def examples(self, options: GlueOptions) -> list[Example]:
        """Return the validation split of the set."""
        return validation_rows(options.data_path, options.dataset)

    def answers(
        self, loaded: "LoadedModel", examples: Sequence[Example], options: GlueOptions, done: Collection[int]
    ) -> Iterator[tuple[int, "Completion"]]:
        """Yield (index, the word of the class that a head chooses, or what the model writes)."""
        from lora_one.data.encode import encoder_of
        from lora_one.evaluation.class_choice import by_first_token, by_head, words_of
        from lora_one.evaluation.generate import Completion, Decoding, complete
        from lora_one.models import kind_of

        model, tokenizer = loaded.model, loaded.tokenizer
        encoder = encoder_of(kind_of(model), tokenizer, model.config)
        head = kind_of(model).has_head
        check_read(options, head=head)
        if head:
            words = words_of(model.config, options.labels)
            for index, place, details in by_head(loaded, encoder, examples, options.max_length, done):
                yield index, Completion(words[place], details=details)
            return
        first = by_first_token(loaded, encoder, examples, options.labels, done) if options.first_token else {}
        decoding = Decoding(options.max_new_tokens)
        prompts = encoder.prompts(examples)
        for index, completion in complete(model, tokenizer, prompts, decoding, loaded.batch_size, done=done):
            yield index, replace(completion, details=first.get(index, {}))

    def score(self, example_id: Any, prompt: str, completion: str, gold: str) -> dict[str, Any]:
        """Return one line of predictions.jsonl; a text that is not a word of the set's classes is unparsed.

        Raises KeyError: the id names no set; ValueError: gold is not a word of its classes.
        """
        written, labels = completion.strip(), labels_of(example_id)
        if gold not in labels:
            raise ValueError(f"the gold answer {gold!r} is not one of {', '.join(labels)}")
        prediction = written if written in labels else None
        return {
            "id": example_id,
            "prompt": prompt,
            "completion": completion,
            "prediction": prediction,
            "gold": gold,
            "correct": prediction == gold,
        }

    def summarize(self, predictions: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
        """(metrics, counts): accuracy, for CoLA Matthews' coefficient and for MRPC and QQP F1, as GLUE defines them.

        Standard errors: of a share sqrt(p (1 - p) / n), else the jackknife's. Raises UsageError: lines of several sets.
        """
        names = sorted({set_of(line["id"]) for line in predictions})
        if len(names) > 1:
            raise UsageError(f"these predictions are of several sets ({', '.join(names)}): score each by itself")
        labels = labels_of(predictions[0]["id"])
        places = {word: place for place, word in enumerate(labels)}
        pairs: Pairs = Counter((places[line["gold"]], places.get(line["prediction"], -1)) for line in predictions)
        metrics = shares(by_kind(predictions, KINDS))
        for name, measure in MEASURES.get(names[0], {}).items():
            metrics |= {name: measure(pairs), f"{name}_stderr": jackknife(measure, pairs)}
        return metrics, counts_of(predictions)

    def remarks(self, predictions: Sequence[dict[str, Any]]) -> dict[str, int]:
        """Count the texts that a head has read only in part."""
        return {"texts_shortened": sum("shortened" in line for line in predictions)}
