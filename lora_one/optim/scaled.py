"""Any torch optimizer on preconditioned gradients: scaled AdamW, scaled gradient descent and others."""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from lora_one.errors import RunError, UsageError, nearest
from lora_one.optim.pairs import Pair, lora_pairs
from lora_one.optim.precondition import Half, precondition
from lora_one.types import Damping, Order


def create_scaled_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    reg: float = 1e-6,
    damping: Damping = "absolute",
    order: Order = "simultaneous",
    params: Iterable[Any] | None = None,
    **kwargs: Any,
) -> Optimizer:
    """Return an ``optimizer_cls`` that uses g_A <- (B^T B + lambda I)^-1 g_A and g_B <- g_B (A A^T + lambda I)^-1.

    Source: arXiv:2402.02347, eq. 9 of arXiv:2502.01235. The signature extends PEFT's create_riemannian_optimizer.
    AdamW's moments are those of the preconditioned gradient, which ``grad`` contains after a step. Parameters outside
    pairs of LoRA factors (see `lora_pairs`) are stepped by ``optimizer_cls`` without a preconditioner.

    reg: lambda.  damping: ``absolute``, lambda is ``reg``; ``relative``, ``reg`` times the Gram matrix's mean diagonal.
    order: ``simultaneous``, both factors from the same point as in eq. 9; ``sequential``, first A, then B with the Gram
    matrix of the new A, as in the published code.  params: parameters or groups; default: all trainable ones.
    kwargs: arguments of optimizer_cls.  Every group has the entries ``reg`` and ``relative_reg``.
    Raises UsageError (a ValueError): a negative or infinite reg, an unknown damping or order, no pair to precondition,
    an optimizer that needs a closure. TypeError: optimizer_cls is not an optimizer class.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, not {optimizer_cls!r}")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(
            f"{optimizer_cls.__name__} evaluates the loss several times in a step, between which the preconditioner "
            "would change: use an optimizer whose step needs no closure, such as AdamW or SGD"
        )
    for name, value, kind in (("damping", damping, Damping), ("order", order, Order)):
        if value not in get_args(kind):
            raise UsageError(f"{name}={value} is not a choice; {nearest(value, get_args(kind))}")
    if params is None:
        params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return scaled(optimizer_cls)(
        params,
        lora_pairs(model),
        reg=reg,
        relative_reg=damping == "relative",
        sequential=order == "sequential",
        lr=lr,
        **kwargs,
    )


class Scaled(Optimizer):
    """Base of the scaled optimizers, which precondition the gradients of LoRA pairs before each step.

    The damping is an entry of the parameter groups, so it is saved, loaded and changed like a learning rate. The pairs
    refer to the parameters themselves, so pickle and deepcopy include them.
    """

    inner: ClassVar[type[Optimizer]]
    halves: Sequence[Half]  # two for each pair: A preconditioned by B, then B by A
    sequential: bool

    def __init__(
        self, params: Any, pairs: Iterable[Pair], *, reg: float, relative_reg: bool, sequential: bool, **options: Any
    ):
        super().__init__(params, **options)
        self.defaults |= {"reg": reg, "relative_reg": relative_reg}
        self._complete_groups()
        for group in self.param_groups:
            if not (group["reg"] >= 0 and math.isfinite(group["reg"])):
                raise UsageError(f"reg={group['reg']} is out of range: the damping must be finite and not negative")
        mine = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        pairs = [pair for pair in pairs if id(pair.A) in mine and id(pair.B) in mine]
        if not pairs:
            raise UsageError(
                "no layer has both of its LoRA factors, lora_A and lora_B, among the parameters to train, so there is "
                f"nothing to precondition: use {self.inner.__name__} itself"
            )
        self.halves = [half for layer, A, B, _ in pairs for half in (Half(layer, A, B, True), Half(layer, B, A, False))]
        self.sequential = sequential

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            for name in ("reg", "relative_reg"):
                group.setdefault(name, self.defaults[name])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a closure is evaluated once, before the gradients are preconditioned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.sequential:
            up = [half.factor for half in self.halves if not half.is_A]
            known = {id(parameter) for parameter in up}
            others = [p for group in self.param_groups for p in group["params"] if id(p) not in known]
            for later in (up, others):  # first A and all other parameters, then B
                with without_gradients(later):
                    self._precondition()
                    self._inner_step()
        else:
            self._precondition()
            self._inner_step()
        return loss

    def _precondition(self) -> None:
        groups = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        batches: dict[tuple, list[Half]] = defaultdict(list)
        for half in self.halves:
            factor, group = half.factor, groups.get(id(half.factor))
            if group is None:
                raise RunError(
                    f"the factors of {half.layer} are no longer parameters of this optimizer: wrap or shard the model "
                    "first, then create the optimizer"
                )
            if factor.grad is not None:
                rank = factor.shape[0 if half.is_A else 1]
                batches[rank, factor.dtype, factor.device, group["reg"], group["relative_reg"]].append(half)
        for (*_, reg, relative), batch in batches.items():
            precondition(batch, reg, relative=relative)

    def _inner_step(self) -> None:
        step_without_hooks(self, super().step)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"halves": self.halves, "sequential": self.sequential}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._complete_groups()  # for a state that a plain optimizer saved

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare, (self.inner,), self.__getstate__()


@cache
def scaled(optimizer_cls: type[Optimizer]) -> type[Scaled]:
    """Return the subclass of `Scaled` and of the optimizer's class."""
    return type(f"Scaled{optimizer_cls.__name__}", (Scaled, optimizer_cls), {"inner": optimizer_cls})


def _bare(optimizer_cls: type[Optimizer]) -> Scaled:
    cls = scaled(optimizer_cls)
    return cls.__new__(cls)


def step_without_hooks(optimizer: Optimizer, step: Callable[[], Any]) -> None:
    """Take the step of a base class. torch wraps it in one that runs hooks, which only the outer step may run."""
    step.__wrapped__(optimizer) if getattr(step, "hooked", False) else step()


@contextmanager
def without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Exclude parameters from an optimizer's step by removing their gradients inside this context."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
