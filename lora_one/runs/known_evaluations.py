"""Evaluations of models before training that another run has made, in the folder ``init.cache``."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_one.distributed import Processes
from lora_one.files import write_json
from lora_one.initialization.cache import Key, unwritable

Metrics = dict[str, float]


@dataclass(frozen=True)
class KnownEvaluations:
    """Finds an evaluation by everything that it depends on, or makes and stores it.

    folder: that of ``init.cache``; None: every evaluation is made.
    """

    folder: Path | None

    def __call__(self, what: str, key: Callable[[], Key], evaluate: Callable[[], Metrics]) -> Metrics:
        """Return the stored metrics of a model; if there are none, those of ``evaluate``.

        what: the model in words, for the line that is printed.  key: returns all that its metrics depend on.
        Either all processes read or all evaluate; the first one writes. Metrics that are not finite are not stored.
        Raises RunError: the folder cannot be written.
        """
        if self.folder is None:
            return evaluate()
        processes, found = Processes.current(), key()
        digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
        file = self.folder / "evaluations" / f"{digest[:16]}.json"
        known = read(file)
        if all(processes.gathered(known is not None)):
            if processes.rank == 0:
                print(f"init.cache: evaluation of {what} read from {file}")
            return known
        metrics = evaluate()
        if processes.rank == 0:
            try:
                write_json(file, {"key": found, "metrics": metrics})
            except ValueError:  # a metric is not finite
                pass
            except OSError as error:
                raise unwritable(self.folder, error) from error
        return metrics


def read(file: Path) -> Metrics | None:
    """Return the metrics in a file; None: it is missing or cannot be read."""
    try:
        return json.loads(file.read_text())["metrics"]
    except (OSError, ValueError, KeyError):
        return None
