"""Evaluations of models before training that another run has made, in the folder ``init.cache``."""

import math
from collections.abc import Callable
from pathlib import Path

from lora_one.distributed import Processes
from lora_one.files import write_json
from lora_one.initialization.cache import Key, digest_of, entry_in

Metrics = dict[str, float]


def known_evaluation(
    folder: Path | None, what: str, key_of: Callable[[], Key], evaluate: Callable[[], Metrics]
) -> Metrics:
    """Return the metrics of a model that are stored in a folder; if there are none, evaluate it and store the result.

    folder: None: nothing is stored.  what: the model in words, for the line that is printed.  key_of: returns all
    that the metrics depend on.
    Either all processes read or all evaluate; the first one writes. Metrics that are not finite are not stored. A
    folder that cannot be written is only a note, because the metrics are there.
    """
    if folder is None:
        return evaluate()
    processes, key = Processes.current(), key_of()
    file = folder / f"{digest_of(key)}.evaluation"
    known = read(file, key)
    if all(processes.gathered(known is not None)):
        if processes.rank == 0:
            print(f"init.cache: evaluation of {what} read from {file}")
        return known
    metrics = evaluate()
    if processes.rank == 0 and all(map(math.isfinite, metrics.values())):
        try:
            write_json(file, {"key": key, "metrics": metrics})
        except OSError as error:
            print(f"note: init.cache: the evaluation of {what} cannot be stored in {folder} ({error})")
    return metrics


def read(file: Path, key: Key) -> Metrics | None:
    """Return the metrics in a file; None: it is missing, cannot be read, or is not the one of this key."""
    try:
        return entry_in(file, key).get("metrics") or None
    except (OSError, ValueError):
        return None
