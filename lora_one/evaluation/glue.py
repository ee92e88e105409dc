"""GLUE's and SuperGLUE's classification sets, on their validation splits: by a head, or by the word a model writes.

A head answers with its likeliest class. A model that writes text is asked as in training, and what it writes must be
the word of a class; ``--first_token`` adds the published comparison of the words' first tokens.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING, Any

from lora_one.data import glue, super_glue
from lora_one.errors import RunError, UsageError, nearest
from lora_one.evaluation.shares import by_kind, counts_of, shares
from lora_one.types import Example

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_one.data.encode import Encoded, Encoder
    from lora_one.evaluation.generate import Completion

MAX_NEW_TOKENS = 16
MAX_LENGTH = 512
SETS = glue.TASKS | super_glue.TASKS
SETTINGS = ("dataset", "first_token", "max_length")
DATA_SETTINGS = ("dataset",)
UNREAD_BY_HEAD = {"first_token": False, "max_new_tokens": MAX_NEW_TOKENS}
UNREAD_BY_WRITER = {"max_length": MAX_LENGTH}
KINDS = {"accuracy": "correct", "accuracy_first_token": "correct_first_token"}
Pairs = Counter[tuple[int, int]]  # (true class, predicted class or -1) -> examples


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", help=f"one of {', '.join(SETS)}")
    add("--first_token", action="store_true", help="also compare the first tokens of the words, as published")
    add("--max_length", type=int, default=MAX_LENGTH, help="tokens a head reads of an example (%(default)s)")


def check(options: argparse.Namespace) -> None:
    """Raises UsageError: no such set, a value out of range, or an option of sampling."""
    if options.rescore:
        return
    if options.dataset is None:
        raise UsageError(f"no set is named: give --dataset=<one of {', '.join(SETS)}>")
    if options.dataset not in SETS:
        raise UsageError(
            f"--dataset={options.dataset} is not a set of GLUE or SuperGLUE: {nearest(options.dataset, SETS)}"
        )
    if options.temperature is not None:
        raise UsageError(f"--temperature={options.temperature} is not read here: a class is not sampled; leave it out")
    if options.max_length < 2:
        raise UsageError(f"--max_length={options.max_length} must be at least 2 tokens: give a larger number")
    options.labels = SETS[options.dataset].labels


def folder(options: argparse.Namespace) -> str:
    """Each set has its own results."""
    return f"glue/{options.dataset}"


def examples(data_path: str | None, dataset: str) -> list[Example]:
    """The validation split of a set, with ids ``<set>/<number>``: the labels of its test split are not public."""
    found = SETS[dataset].rows_of(data_path, SETS[dataset].held_out)
    return [replace(example, id=f"{dataset}/{number}") for number, example in enumerate(found)]


def answers(
    model: "nn.Module", tokenizer: Any, examples: Sequence[Example], options: argparse.Namespace, done: Collection[int]
) -> Iterator[tuple[int, "Completion"]]:
    from lora_one.data.encode import encoder_of
    from lora_one.evaluation.generate import Completion, Decoding, complete
    from lora_one.models import kind_of

    encoder = encoder_of(kind_of(model), tokenizer, model.config)
    head = kind_of(model).has_head
    unread = UNREAD_BY_HEAD if head else UNREAD_BY_WRITER
    for name, default in unread.items():
        if getattr(options, name) != default:
            reader = "a model that writes text" if head else "a classification head"
            raise UsageError(f"--{name}={getattr(options, name)} is read of {reader} alone: leave it out")
    if head:
        words = words_of(model.config, options.labels)
        for index, place, details in by_head(model, encoder, examples, options, done):
            yield index, Completion(words[place], details=details)
        return
    first = by_first_token(model, encoder, examples, options, done) if options.first_token else {}
    decoding = Decoding(options.max_new_tokens)
    prompts = encoder.prompts(examples)
    for index, completion in complete(model, tokenizer, prompts, decoding, options.batch_size, done=done):
        yield index, replace(completion, details=first.get(index, {}))


def words_of(config: Any, labels: Sequence[str]) -> list[str]:
    """The word of each output of a head: by the checkpoint's own names where these are the set's, in any case; else in
    the set's order.

    Raises UsageError: the head has another number of outputs.
    """
    own = [config.id2label[place] for place in range(config.num_labels)]
    if len(own) != len(labels):
        raise UsageError(
            f"the model's head has {len(own)} outputs, and this set {len(labels)} classes ({', '.join(labels)}): give "
            "a model that was trained on it"
        )
    own = [str(name).lower() for name in own]
    return own if set(own) == set(labels) else list(labels)


def by_head(
    model: "nn.Module",
    encoder: "Encoder",
    examples: Sequence[Example],
    options: argparse.Namespace,
    done: Collection[int],
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (index, the output with the largest logit, details), longest texts first.

    Of several processes each has its share. A text is cut at max_length, or at what positions the model has learnt;
    the details say so.
    """
    from lora_one.data.encode import collate
    from lora_one.losses import model_logits
    from lora_one.models import learnt_positions

    found = encoder.rows(examples, min(options.max_length, learnt_positions(model) or options.max_length))
    rows = [row for row, _ in found]
    cut = [{"shortened": True} if short else {} for _, short in found]

    def chosen(batch: Sequence[int]) -> list[int]:
        return largest(model_logits(model, collate([rows[index] for index in batch], encoder.pad_id)))

    for index, place in in_batches(model, dict(enumerate(rows)), chosen, options.batch_size, done):
        if index not in done:
            yield index, place, cut[index]


def by_first_token(
    model: "nn.Module",
    encoder: "Encoder",
    examples: Sequence[Example],
    options: argparse.Namespace,
    done: Collection[int],
) -> dict[int, dict[str, Any]]:
    """Index -> the class whose word's first token is likeliest behind the prompt, of those of all words.

    The published comparison, which is of two words, holds with any number of them; tokens with which all words begin
    (an encoder-decoder's BOS, say) are read first. Raises UsageError: two words are not apart at the next one.
    """
    from lora_one.data.encode import collate
    from lora_one.distributed import Processes
    from lora_one.evaluation.choices import common_beginning
    from lora_one.evaluation.generate import context_length
    from lora_one.losses import IGNORED, model_logits, targets

    as_answers = encoder.encode([Example(examples[0].prompt, word) for word in options.labels], 1 << 30)[0]
    wanted = targets(collate(as_answers, encoder.pad_id))
    words = [row[row != IGNORED].tolist() for row in wanted]
    alike = len(common_beginning(words))
    tokens = [word[alike] for word in words]
    if len(set(tokens)) < len(tokens):
        raise UsageError(
            f"--first_token cannot tell {', '.join(options.labels)} apart: for this tokenizer two of them begin with "
            "the same token; leave it out"
        )
    context = context_length(model)
    kept = [index for index, ids in enumerate(encoder.prompts(examples)) if len(ids) + max(alike, 1) <= context]
    encoded = encoder.encode([examples[index] for index in kept], context)[0] if kept else []
    rows = dict(zip(kept, encoded, strict=True))

    def compared(batch: Sequence[int]) -> list[int]:
        together = collate([rows[index] for index in batch], encoder.pad_id)
        first = (targets(together) != IGNORED).int().argmax(dim=1) + alike
        logits = model_logits(model, together)
        return largest(logits[range(len(batch)), first][:, tokens])

    nothing = {"prediction_first_token": None, "correct_first_token": False}
    found: dict[int, dict[str, Any]] = dict.fromkeys(set(range(len(examples))) - set(kept), nothing)
    for index, place in in_batches(model, rows, compared, options.batch_size, done):
        word = options.labels[place]
        found[index] = {"prediction_first_token": word, "correct_first_token": word == examples[index].gold}
    return {index: line for part in Processes.current().gathered(found) for index, line in part.items()}


def in_batches(
    model: "nn.Module",
    rows: "dict[int, Encoded]",
    choose: Callable[[Sequence[int]], list[int]],
    batch_size: int,
    done: Collection[int],
) -> Iterator[tuple[int, int]]:
    """Yield (index, what ``choose`` gives for it), longest rows first; of several processes each has its share."""
    import torch

    from lora_one.distributed import Processes
    from lora_one.evaluation.batches import each_batch
    from lora_one.losses import evaluating

    order = sorted(rows, key=lambda index: -len(rows[index].input_ids))
    with torch.no_grad(), evaluating(model):
        for batch, places in each_batch(order, batch_size, choose, done, Processes.current()):
            yield from zip(batch, places, strict=True)


def largest(logits: "Tensor") -> list[int]:
    """(rows, classes) -> the class with the largest logit of each row. Raises RunError: there is none."""
    if not logits.isfinite().all():
        raise RunError("the model gives logits that are no numbers: try --dtype=fp32, or check the checkpoint")
    return logits.argmax(-1).tolist()


def score(example_id: Any, prompt: str, completion: str, gold: str) -> dict[str, Any]:
    """One line of predictions.jsonl; what is no word of the set's classes is unparsed.

    Raises KeyError: the id is of no set; ValueError: gold is no word of its classes.
    """
    written, labels = completion.strip(), labels_of(example_id)
    if gold not in labels:
        raise ValueError(f"the gold answer {gold!r} is none of {', '.join(labels)}")
    prediction = written if written in labels else None
    return {
        "id": example_id,
        "prompt": prompt,
        "completion": completion,
        "prediction": prediction,
        "gold": gold,
        "correct": prediction == gold,
    }


def labels_of(example_id: Any) -> tuple[str, ...]:
    return SETS[set_of(example_id)].labels


def set_of(example_id: Any) -> str:
    """Of ``<set>/<number>``."""
    return str(example_id).partition("/")[0]


def summarize(predictions: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
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


def remarks(predictions: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many texts a head has read only in part."""
    return {"texts_shortened": sum("shortened" in line for line in predictions)}


def matthews(pairs: Pairs) -> float:
    """Matthews' correlation coefficient, in its form for any number of classes; 0 where it has no value."""
    n = pairs.total()
    right = sum(count for (true, predicted), count in pairs.items() if true == predicted)
    truth, said = Counter[int](), Counter[int]()
    for (true, predicted), count in pairs.items():
        truth[true] += count
        said[predicted] += count
    covariance = n * right - sum(truth[place] * said[place] for place in truth)
    spread = sqrt((n**2 - sum(c**2 for c in truth.values())) * (n**2 - sum(c**2 for c in said.values())))
    return covariance / spread if spread else 0.0


def f1(pairs: Pairs) -> float:
    """F1 of the class 1, the duplicates; 0 where there is none and none is predicted."""
    hits = pairs[1, 1]
    true = sum(count for (place, _), count in pairs.items() if place == 1)
    said = sum(count for (_, place), count in pairs.items() if place == 1)
    return 2 * hits / (true + said) if true + said else 0.0


def jackknife(measure: Callable[[Pairs], float], pairs: Pairs) -> float:
    """Standard error of a measure of n independent examples: sqrt((n - 1)/n sum_i (m_(-i) - mean)^2)."""
    n = pairs.total()
    without = {cell: measure(pairs - Counter([cell])) for cell in pairs}  # the same for every example of a cell
    mean = sum(pairs[cell] * value for cell, value in without.items()) / n
    return sqrt((n - 1) / n * sum(pairs[cell] * (value - mean) ** 2 for cell, value in without.items()))


MEASURES: dict[str, dict[str, Callable[[Pairs], float]]] = {
    "cola": {"matthews": matthews},
    "mrpc": {"f1": f1},
    "qqp": {"f1": f1},
}
