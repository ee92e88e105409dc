"""The class of an optimizer, found by the path in its settings and checked against their keys."""

import dataclasses
import importlib
import inspect
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from lora_one.errors import UsageError, nearest

if TYPE_CHECKING:  # the optimizers can be used as a library without the configuration
    from lora_one.config.optimizers import OptimizerConfig

# keys that are not arguments of the class, but are read by create_scaled_optimizer or create_pair_optimizer
ADDED_BY_SCALING, ADDED_BY_PAIRS = {"damping", "order"}, {"others_lr"}


def optimizer_class(settings: "OptimizerConfig") -> type[Optimizer]:
    """Return the class at the path ``settings.implementation``. A run calls it before it loads anything.

    Raises UsageError: the path is wrong, or the class does not accept a key of the settings.
    """
    path, owner = settings.implementation, type(settings).__name__
    module, _, name = path.rpartition(".")
    found, problem = None, "it is not a subclass of torch.optim.Optimizer"
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        problem = str(error)
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise UsageError(
            f"optimizer={settings.name}: {path} is not the path of an optimizer class ({problem}); correct "
            f"{owner}.implementation in lora_one/config/optimizers.py"
        )
    accepted = arguments_of(found)
    accepted |= ADDED_BY_SCALING if settings.preconditioned else set()
    accepted |= ADDED_BY_PAIRS if settings.steps_pairs else set()
    for field in dataclasses.fields(settings):
        if field.name != "name" and field.name not in accepted:
            raise UsageError(
                f"optimizer.{field.name} is not an argument of {path}; correct the key of {owner} in "
                f"lora_one/config/optimizers.py: {nearest(field.name, accepted)}"
            )
    return found


def arguments_of(optimizer_cls: type[Optimizer]) -> set[str]:
    """Return the names of the class's arguments; ``**options`` are taken to be those of the next base class."""
    names: set[str] = set()
    for kind in optimizer_cls.__mro__:
        if "__init__" in vars(kind):
            parameters = inspect.signature(kind.__init__).parameters.values()
            names |= {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
            if not any(each.kind is each.VAR_KEYWORD for each in parameters):
                break
    return names - {"self", "params"}
