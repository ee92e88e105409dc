"""Layers that consist of LoRA's factors, with the loss 1/2 ||s B A - T||^2, whose gradient is G = s B A - T."""

import copy

import torch
from torch import nn

from tests.helpers.models import FactorLayer

SHAPES = [(12, 8, 3), (8, 12, 3), (12, 8, 3), (10, 9, 2)]  # m, n, r
SCALINGS = [2.0, 0.5, 2.0, 3.0]


def scaled_layers(dtype=torch.float64, shapes=SHAPES, scalings=SCALINGS, *, zero_B=False):
    """Random factors and targets; each layer has its scaling, where PEFT has it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    layers = nn.ModuleList(FactorLayer(normal(m, r), normal(r, n)) for m, n, r in shapes)
    layers.targets = [normal(m, n) for m, n, _ in shapes]
    for layer, scaling in zip(layers, scalings, strict=True):
        layer.scaling = {"default": scaling}
        if zero_B:
            layer.B.data.zero_()
    return layers


def gradient(B, A, s, target):
    """G, the gradient of a layer's loss in W_eff = s B A."""
    return s * B @ A - target


def loss_of(layers):
    return sum(
        (x.scaling["default"] * x.B @ x.A - target).square().sum() / 2
        for x, target in zip(layers, layers.targets, strict=True)
    )


def backward(layers):
    layers.zero_grad()
    loss = loss_of(layers)
    loss.backward()
    return loss


def steps(layers, optimizer, count=3):
    """The parameters after some steps."""
    for _ in range(count):
        backward(layers)
        optimizer.step()
    return [parameter.detach().clone() for parameter in layers.parameters()]


def products(layers):
    return [layer.B.detach() @ layer.A.detach() for layer in layers]


def each(layers):
    """(B, A, s, target) of each layer, detached, in fp64."""
    return [
        (x.B.detach().double(), x.A.detach().double(), x.scaling["default"], target.double())
        for x, target in zip(copy.deepcopy(layers), layers.targets, strict=True)
    ]


def rebased(layers, *, orthogonal=False):
    """The same products B A in other factors, B Q and Q^-1 A."""
    other, generator = copy.deepcopy(layers), torch.Generator().manual_seed(1)
    other.targets = layers.targets
    for layer in other:
        Q = torch.randn(len(layer.A), len(layer.A), generator=generator, dtype=torch.float64)
        Q = torch.linalg.qr(Q)[0] if orthogonal else Q
        layer.A.data, layer.B.data = torch.linalg.solve(Q, layer.A.data), layer.B.data @ Q
    return other
