"""LoRA-One and its neighbours, for low-rank fine-tuning."""

import importlib
from typing import TYPE_CHECKING, Any

from lora_one.quiet import quiet_libraries

if TYPE_CHECKING:
    from lora_one.adaptation.checkpoints import save_adapter
    from lora_one.adaptation.resuming import start_of_checkpoint
    from lora_one.data.given_texts import encode_batches
    from lora_one.initialization.library import initialize_adapters
    from lora_one.training.adapter_callback import AdapterCallback
    from lora_one.types import AdapterFactors, Example, LayerView

    __version__: str

__all__ = [
    "AdapterCallback",
    "AdapterFactors",
    "Example",
    "LayerView",
    "__version__",
    "encode_batches",
    "initialize_adapters",
    "save_adapter",
    "start_of_checkpoint",
]

WHERE = {
    "AdapterCallback": "training.adapter_callback",
    "AdapterFactors": "types",
    "Example": "types",
    "LayerView": "types",
    "encode_batches": "data.given_texts",
    "initialize_adapters": "initialization.library",
    "save_adapter": "adaptation.checkpoints",
    "start_of_checkpoint": "adaptation.resuming",
}

quiet_libraries()


def __getattr__(name: str) -> Any:
    """Public names load torch and PEFT only when they are asked for; the command line checks its keys before that."""
    if name in WHERE:
        return getattr(importlib.import_module(f"lora_one.{WHERE[name]}"), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("lora-one")
        except PackageNotFoundError:  # a checkout that is not installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
