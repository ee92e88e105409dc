"""The structure of a model before a change that may fail or that is temporary: it can be restored exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Attributes = dict[str, tuple[Any, dict[Any, Any] | set[Any] | None]]  # name -> (value, copy of its content)


class Structure:
    """The modules, parameters, hooks and attributes of a model, without copies of the weights.

    Also which parameters are trainable, their gradients, and the model's configuration, which PEFT may change.
    """

    def __init__(self, model: nn.Module):
        configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        owners = [*model.modules(), *(config for config in configs.values() if hasattr(config, "__dict__"))]
        self.attributes = [(owner, attributes_of(owner)) for owner in owners]
        self.parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Restore everything. A weight that was changed in place keeps its new values."""
        for owner, before in self.attributes:
            now = vars(owner)
            for name in now.keys() - before.keys():
                del now[name]
            for name, (value, content) in before.items():
                if content is not None:
                    value.clear()
                    value.update(content)
                now[name] = value
        for parameter, trained, gradient in self.parameters:
            parameter.requires_grad_(trained)
            parameter.grad = gradient


def attributes_of(owner: Any) -> Attributes:
    """Return the attributes of a module or a configuration, with copies of dictionaries and sets."""
    return {
        name: (value, value.copy() if isinstance(value, dict | set) else None) for name, value in vars(owner).items()
    }


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[Structure]:
    """Return a context that restores the model's structure if an error is raised."""
    before = Structure(model)
    try:
        yield before
    except BaseException:
        before.restore()
        raise
