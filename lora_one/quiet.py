"""Output of libraries that says nothing about a run is left out; their other warnings and errors still appear."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOISE = {  # logger -> how its message begins
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional kernel, when PEFT imports it
    # generation continues in a cache of the asked length; what a prompt leaves no room for is counted in metrics.json
    "transformers.generation.stopping_criteria": "This is a friendly reminder",
}


def quiet_libraries() -> None:
    """Drop the messages in ``NOISE``. Called before the libraries are imported, because some log on import."""
    # accelerate passes it, whatever the caller sets
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    for logger, beginning in NOISE.items():
        logging.getLogger(logger).addFilter(lambda record, noise=beginning: not str(record.msg).startswith(noise))


@contextmanager
def quiet_weights() -> Iterator[None]:
    """Hide what transformers prints about weight files within the block; the bars of downloads are shown.

    These are bars for loading and writing, and a report of weights that are not in the checkpoint: ``load_model``
    refuses them, except for a head.
    """
    from transformers.utils import logging as transformers_logging

    def hidden(bar: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return bar(*arguments, **options | {"disable": True})

    def not_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    before = transformers_logging.set_tqdm_hook(hidden)
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(not_report)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)
        logger.removeFilter(not_report)
