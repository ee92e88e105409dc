"""Base of the optimizers that step both factors of a LoRA pair together: LoRA-Pro, LoRA-Muon, LoRA-RITE."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lora_one.errors import RunError, UsageError
from lora_one.linalg import full_precision
from lora_one.optim.pairs import Pair, lora_pairs, refuse_half_frozen
from lora_one.optim.precondition import widened
from lora_one.optim.scaled import step_without_hooks, without_gradients

LARGEST_BATCH = 32  # pairs; limits the memory of the stacked factors


def create_pair_optimizer(
    model: nn.Module, optimizer_cls: "type[PairOptimizer]", *, lr: float, others_lr: float | None = None, **kwargs: Any
) -> "PairOptimizer":
    """Return an ``optimizer_cls`` for the pairs of LoRA factors, which steps all other trainable parameters by AdamW.

    optimizer_cls: LoraPro, LoraMuon or LoraRite.  lr: learning rate of the pairs.  others_lr: of the other parameters
    (a head, DoRA's magnitudes, biases); None: ``lr``.  kwargs: further arguments of the class and of torch's AdamW.
    Create it after the model is wrapped: rank and scaling s of each pair are read from PEFT's layers.
    Raises UsageError (a ValueError): no pair, or a pair of which only one factor is trained.
    """
    refuse_half_frozen(model, optimizer_cls.__name__)
    pairs = lora_pairs(model)
    paired = {id(factor) for pair in pairs for factor in (pair.A, pair.B)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"name": "pairs", "params": [p for p in trained if id(p) in paired], "lr": lr}]
    others = [p for p in trained if id(p) not in paired]
    if others:
        groups.append({"name": "others", "params": others, "lr": lr if others_lr is None else others_lr})
    return optimizer_cls(groups, pairs, lr=lr, **kwargs)


class Batch(NamedTuple):
    """Pairs of one shape, group, scaling and age: A and g_A (k, r, n), B and g_B (k, m, r), in fp32 or wider.

    states: what the optimizer remembers of each pair.  group: its learning rate and other settings.
    step: t of the step that is being taken, counted from 1.
    """

    pairs: list[Pair]
    states: list[dict[str, Tensor]]
    group: dict[str, Any]
    scaling: float
    step: int
    A: Tensor
    B: Tensor
    g_A: Tensor
    g_B: Tensor

    def state(self, name: str, shape: Iterable[int], dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return the tensors of one name, zero at first. dtype: None: that of the stacks."""
        for state in self.states:
            if name not in state:
                state[name] = torch.zeros(*shape, dtype=dtype or self.A.dtype, device=self.A.device)
        return [state[name] for state in self.states]

    def update(self, step_A: Tensor, step_B: Tensor, shrink: float) -> None:
        """Set A <- shrink A + step_A and B <- shrink B + step_B, rounded once to the dtype of the factors."""
        for factors, old, step in (
            ([pair.A for pair in self.pairs], self.A, step_A),
            ([pair.B for pair in self.pairs], self.B, step_B),
        ):
            torch._foreach_copy_(factors, list((shrink * old + step).unbind()))


class PairOptimizer(AdamW):
    """Steps pairs of LoRA factors by ``step_batches``, and every other parameter by torch's AdamW.

    The state of a pair is stored under its B, in fp32 whatever the dtype of the factors (fp64 for fp64 factors, and for
    r x r matrices that need it). A pair is stepped when both of its factors have a gradient. Gradients are not changed.
    """

    pairs: list[Pair]

    def __init__(self, params: Any, pairs: Iterable[Pair], lr: float, **options: Any):
        for option in ("maximize", "amsgrad"):
            if options.get(option):
                raise UsageError(f"{option}=True: {type(self).__name__} does not have it for LoRA pairs; leave it out")
        super().__init__(params, lr, **options)
        # else a GradScaler would leave unscaling to the fused kernel, which does not see the gradients of the pairs
        self._step_supports_amp_scaling = False
        groups = self._groups()
        self.pairs = [pair for pair in pairs if id(pair.A) in groups or id(pair.B) in groups]
        if not self.pairs:
            raise UsageError(
                "no layer has both of its LoRA factors, lora_A and lora_B, among the parameters to train, so "
                f"{type(self).__name__} has nothing to step: use AdamW"
            )
        for pair in self.pairs:
            if groups.get(id(pair.A)) is not groups.get(id(pair.B)):
                raise UsageError(
                    f"the factors of {pair.layer} are in different parameter groups, but {type(self).__name__} steps "
                    "them together: put both in one group, without a learning rate of its own for B (LoRA+)"
                )

    @classmethod
    def first_change(cls, lr: float, scaling: float, m: int, n: int) -> float | None:
        """Return min(||s D_B A||, ||s B D_A||) of the first step of factors of full rank; None: not known.

        Spectral norms, of a layer with W (m, n); without weight decay.
        """
        return None

    def step_batches(self, batches: Iterator[Batch]) -> None:
        """Step the pairs of all batches, without gradients and with fp32 products."""
        raise NotImplementedError

    def _set_defaults(self, **settings: Any) -> None:
        """Add settings of the class to every parameter group, so that they are saved and can be changed."""
        self.defaults |= settings
        for group in self.param_groups:
            for name, value in settings.items():
                group.setdefault(name, value)

    def _groups(self) -> dict[int, dict[str, Any]]:
        return {id(parameter): group for group in self.param_groups for parameter in group["params"]}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a closure is evaluated once, at the beginning."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad(), full_precision(self.pairs[0].A.device):
            try:
                self.step_batches(self._batches())
            except torch.linalg.LinAlgError as error:
                raise self._diverged() from error
        with without_gradients([factor for pair in self.pairs for factor in (pair.A, pair.B)]):
            step_without_hooks(self, super().step)
        return loss

    def _batches(self) -> Iterator[Batch]:
        """Count the step of each pair and yield the pairs in stacks."""
        groups = self._groups()
        alike: dict[tuple, list[Pair]] = defaultdict(list)
        for pair in self.pairs:
            group = groups.get(id(pair.B))
            if group is None:
                raise RunError(
                    f"the factors of {pair.layer} are no longer parameters of this optimizer: wrap or shard the model "
                    "first, then create the optimizer"
                )
            if pair.A.grad is not None and pair.B.grad is not None:
                step = self.state[pair.B].setdefault("step", torch.tensor(0.0))  # on the CPU
                step += 1
                key = (pair.A.shape, pair.B.shape, pair.B.dtype, pair.B.device, id(group), pair.scaling, int(step))
                alike[key].append(pair)
        for (*_, dtype, _, _, scaling, step), members in alike.items():
            wide = torch.promote_types(dtype, torch.float32)
            for first in range(0, len(members), LARGEST_BATCH):
                some = members[first : first + LARGEST_BATCH]
                A, B = [pair.A for pair in some], [pair.B for pair in some]
                stacks = [
                    widened(torch.stack(list(each)), wide) for each in (A, B, [p.grad for p in A], [p.grad for p in B])
                ]
                yield Batch(some, [self.state[p] for p in B], groups[id(B[0])], scaling, step, *stacks)

    def _diverged(self) -> RunError:
        for pair in self.pairs:
            if not (pair.A.isfinite().all() and pair.B.isfinite().all()):
                wrong = f"the factors of {pair.layer} are not finite"
                break
        else:
            largest = max(float(f.grad.abs().max()) for p in self.pairs for f in (p.A, p.B) if f.grad is not None)
            wrong = f"the squares of the gradients (largest entry: {largest:.2g}) are not finite"
        return RunError(f"{wrong}: training has diverged; lower the learning rate")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. The state of pairs stays as it was saved; torch would round it to the dtype of the factors."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        of = {id(parameter): state_dict["state"].get(number, {}) for number, parameter in zip(saved, mine, strict=True)}
        for pair in self.pairs:
            for name, value in of[id(pair.B)].items():
                self.state[pair.B][name] = value.to("cpu" if name == "step" else pair.B.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"pairs": self.pairs}
