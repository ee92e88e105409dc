"""Modules of the r x r architecture: a frozen linear map, and a frozen linear map with a trained core."""

from torch import Tensor, nn
from torch.nn import functional as F


class Frozen(nn.Module):
    """A linear map whose weight is a buffer: saved and loaded with the adapter, but never trainable."""

    weight: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Core(nn.Module):
    """Replaces PEFT's B: B (m, r) is frozen, R (r, r) is trained. To PEFT it is one linear map with the weight B R."""

    B: Tensor

    def __init__(self, B: Tensor):
        super().__init__()
        self.register_buffer("B", B)
        self.R = nn.Parameter(B.new_zeros(B.shape[1], B.shape[1]))

    @property
    def weight(self) -> Tensor:
        return self.B @ self.R

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.R), self.B)
