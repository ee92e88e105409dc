"""AdamW whose bias correction can be switched off, as in the published code of preconditioned AdamW."""

import math
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """torch's AdamW; with ``correct_bias=False`` it computes p <- p - lr wd p - lr m / (sqrt(v) + eps).

    torch divides m by 1 - beta1^t and v by 1 - beta2^t. Without the correction the step count t is infinite from the
    start, so both divisors are 1. This works with all of torch's implementations (for-loop, foreach, fused).
    ``correct_bias`` is an entry of every parameter group.
    """

    def __init__(self, params: Any, lr: float = 1e-3, *, correct_bias: bool = True, **options: Any):
        super().__init__(params, lr, **options)
        self.defaults["correct_bias"] = correct_bias
        for group in self.param_groups:
            group.setdefault("correct_bias", correct_bias)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("correct_bias", True)  # missing in a state that torch's AdamW saved

    def _init_group(self, group: dict[str, Any], *collected: Any) -> bool:
        fresh = [p for p in group["params"] if p.grad is not None and not self.state[p]]
        has_complex = super()._init_group(group, *collected)
        if not group["correct_bias"]:
            for parameter in fresh:
                self.state[parameter]["step"].fill_(math.inf)
        return has_complex
