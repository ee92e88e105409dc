"""LoRA-One and its neighbours, for low-rank fine-tuning."""

from typing import TYPE_CHECKING, Any

from lora_one.quiet import quiet_libraries

if TYPE_CHECKING:
    from lora_one.adaptation.checkpoints import save_adapter
    from lora_one.initialization.library import initialize_adapters

    __version__: str

__all__ = ["__version__", "initialize_adapters", "save_adapter"]

quiet_libraries()


def __getattr__(name: str) -> Any:
    """Public names load torch and PEFT only when they are asked for; the command line checks its keys before that."""
    if name == "initialize_adapters":
        from lora_one.initialization.library import initialize_adapters

        return initialize_adapters
    if name == "save_adapter":
        from lora_one.adaptation.checkpoints import save_adapter

        return save_adapter
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("lora-one")
        except PackageNotFoundError:  # a checkout that is not installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
