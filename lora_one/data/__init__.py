"""Turn the rows of a data set into encoded examples: read, filter, order, split and encode."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lora_one.data.encode import Encoded, Encoder
from lora_one.data.encoded_cache import EncodedCache
from lora_one.data.stored import chosen, training_examples
from lora_one.datasets import DATASETS, labels_of
from lora_one.datasets.settings import DatasetConfig
from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.model_kinds import MODEL_KINDS
from lora_one.seeding import generator_for
from lora_one.types import Example


def head_labels(model_type: str, name: str) -> tuple[str, ...] | None:
    """Return the words of a classification head's outputs; None: the model generates text."""
    return labels_of(name) if MODEL_KINDS[model_type].has_head else None


@dataclass(frozen=True)
class Splits:
    """Encoded training and validation examples (disjoint), their texts, and counts of dropped or shortened examples."""

    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    train_texts: Sequence[Example]
    validation_texts: Sequence[Example]
    counts: dict[str, Any]


def load_dataset(config: DatasetConfig, encoder: Encoder, max_length: int) -> Splits:
    """Read a data set, remove rows with an evaluation's questions, order, filter by length, split and encode.

    The order is that of the file, or shuffled with ``shuffle_seed``. The first ``train_size`` examples are for
    training, the next ``validation_size`` for validation; if there are fewer, they are split in that proportion. Both
    are then cut to ``max_train_samples`` and ``max_eval_samples``. Without ``validation_size``, the validation examples
    are those of the source's validation split, if it has one; a ``path`` to a single file has none.
    Raises RunError: no training example is left, before or after encoding.
    """
    read = training_examples(config)
    examples, _ = prepared(read.examples, config, encoder)
    found, contaminated, left = read.rows, read.contaminated, len(examples)
    train, validation = split(examples, config.train_size, config.validation_size)
    if not train:
        raise no_training_example(config, found, sum(contaminated.values()), len(validation))
    if has_own_validation(config):
        validation, more = prepared(list(DATASETS[config.name].validation(config)), config, encoder)
        left, found = left + len(validation), found + more
    train = train[: config.max_train_samples]
    validation = validation[: config.max_eval_samples]
    kept = encoded_cache_for(config, encoder, max_length=max_length)
    encoded_train, train_counts = kept.encoded(lambda part: encoder.encode(part, max_length), train)
    if not encoded_train:
        raise encoder.nothing_left(train, max_length)
    encoded_validation, validation_counts = kept.encoded(lambda part: encoder.encode(part, max_length), validation)
    counts = {
        "rows": found,
        "contaminated": contaminated,
        "too_long": found - sum(contaminated.values()) - left,
        "train": asdict(train_counts),
        "validation": asdict(validation_counts),
    }
    if Processes.current().rank == 0:
        print("".join(f"data: {note}\n" for note in notes(config, counts, max_length)), end="", flush=True)
    return Splits(encoded_train, encoded_validation, train, validation, counts)


def no_training_example(config: DatasetConfig, rows: int, contaminated: int, validation: int) -> RunError:
    """Return the error to raise if no row is left for training; it names the keys that have removed the rows.

    validation: the number of rows that are held out.
    """
    too_long = rows - contaminated - validation
    causes = (
        (contaminated, f"contain questions of dataset.decontaminate={config.decontaminate}", "check the file"),
        (too_long, f"have dataset.max_tokens={config.max_tokens} tokens or more", "increase dataset.max_tokens"),
        (
            validation,
            f"are held out by dataset.validation_size={config.validation_size}",
            "decrease dataset.validation_size",
        ),
    )
    found = [(f"{count} {reason}", way) for count, reason, way in causes if count > 0]
    reasons, ways = (", ".join(texts) for texts in zip(*found, strict=True))
    return RunError(
        f"dataset={config.name}: none of the {rows} rows is left for training ({reasons}): {ways}, or pass a file with "
        "more rows"
    )


def notes(config: DatasetConfig, counts: dict[str, Any], max_length: int) -> Iterator[str]:
    """Yield a note for each kind of rows that were removed or truncated, and if no validation example is left.

    counts: those of ``Splits``.
    """
    if counts["too_long"]:
        yield f"{counts['too_long']} of {counts['rows']} rows have {config.max_tokens} tokens or more and were removed"
    for part, name in (("train", "training"), ("validation", "validation")):
        total = sum(counts[part].values())
        if counts[part]["dropped"]:
            yield (
                f"{counts[part]['dropped']} of {total} {name} examples were dropped, because the prompt or the "
                f"response is empty or no response token is within model.max_length={max_length}"
            )
        if counts[part]["shortened"]:
            yield f"{counts[part]['shortened']} of {total} {name} examples were cut to model.max_length={max_length}"
    if config.validation_size and not sum(counts["validation"].values()):
        yield (
            f"WARNING: no validation example, because dataset.validation_size={config.validation_size:g} of "
            f"{counts['rows']} rows is less than one example: raise it for a validation loss"
        )


def read_examples(config: DatasetConfig, encoder: Encoder) -> tuple[Sequence[Example], int]:
    """Return the training examples, ordered and filtered by length, and their number before the filter."""
    return prepared(list(DATASETS[config.name].train(config)), config, encoder)


def has_own_validation(config: DatasetConfig) -> bool:
    """Return whether validation has its own split, instead of being held out of the training rows."""
    single = config.path is not None and Path(config.path).expanduser().is_file()
    return DATASETS[config.name].validation is not None and config.validation_size is None and not single


def prepared(examples: Sequence[Example], config: DatasetConfig, encoder: Encoder) -> tuple[Sequence[Example], int]:
    """Return the examples, ordered and filtered by length, and their number before the filter."""
    found = len(examples)
    if config.shuffle_seed is not None:
        order = torch.randperm(found, generator=generator_for(config.shuffle_seed, "order of the data"))
        examples = chosen(examples, order)
    if config.max_tokens is not None:
        sizes = encoded_cache_for(config, encoder).measured(encoder.sizes, examples)
        examples = chosen(examples, (sizes < config.max_tokens).nonzero().flatten())
    return examples, found


def split(
    examples: Sequence[Example], train_size: int | None, validation_size: float | None
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return the first examples for training and the next ones for validation; too few are split in proportion.

    validation_size: a number of examples, or below 1 a fraction of all.  train_size: None: all other examples.
    """
    validation_size = validation_size or 0
    held_out = int(len(examples) * validation_size) if validation_size < 1 else int(validation_size)
    train_size = train_size if train_size is not None else max(len(examples) - held_out, 0)
    wanted = train_size + held_out
    if wanted > len(examples):
        held_out = len(examples) * held_out // wanted
        train_size = len(examples) - held_out
    return examples[:train_size], examples[train_size : train_size + held_out]


def encoded_cache_for(config: DatasetConfig, encoder: Encoder, **settings: Any) -> EncodedCache:
    """Return the cache of this encoder's results; the encoder's class and all its fields are part of the key."""
    values = {field.name: getattr(encoder, field.name) for field in fields(encoder) if field.name != "tokenizer"}
    return EncodedCache(config.cache, encoder.tokenizer, settings | values | {"encoder": type(encoder).__name__})
