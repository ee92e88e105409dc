"""What ``initialize_adapters`` must leave unchanged if it fails."""

from typing import Any


def structure(model) -> list[Any]:
    """Modules, parameters, hooks and attributes, by identity; which parameters are trained; the configuration."""
    found: list[Any] = [model.config.to_dict()]
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        parts = [(key, id(part)) for key, part in (*module._parameters.items(), *module._modules.items())]
        found.append((name, type(module), module.training, sorted(vars(module)), hooks, parts, list(module._buffers)))
    found += [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()]
    return found
