"""Engines compute what benchmarks ask of a model: completions and log-likelihoods.

A new engine is a class like ``protocol.Engine`` in a file here, and a line in ENGINES, from which --engine chooses.
Nothing is imported before an engine is started, so options are checked at once.
"""

from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_one.evaluation.engines.protocol import Engine

TRANSFORMERS, SERVER = "transformers", "server"
ENGINES: dict[str, str] = {  # name -> its class
    TRANSFORMERS: "lora_one.evaluation.engines.local:Transformers",
    SERVER: "lora_one.evaluation.engines.server:Server",
}


def engine_class(name: str) -> "type[Engine]":
    """Return the class of an engine."""
    return resolve_name(ENGINES[name])
