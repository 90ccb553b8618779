"""Activation offloading: gradients are those without it, and no more inputs than planned stay on the device."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import glu

from trainer.cpu_emulation import CpuAsCuda
from trainer.models.offload import ActivationOffload

HIDDEN, WIDTH, LAYERS, TOKENS = 8, 24, 7, 5


class MLP(nn.Module):
    """Keeps the gate's input, of WIDTH columns, for its backward pass; and a vector of that length."""

    saved_tensors: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, alive: weakref.WeakSet[Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH // 2, HIDDEN)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.alive, self.most = alive, 0

    def forward(self, x: Tensor) -> Tensor:
        with self.saved_tensors():
            wide = _Wide.apply(x, self.up.weight, self.scale)
            self.alive.add(wide)
            self.most = len(self.alive)
            out: Tensor = self.down(glu(wide))
            return out


class _Wide(torch.autograd.Function):
    """x @ weight.T * scale, as a fused operation: what it keeps is its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        return x @ weight.T * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (x, weight, scale), gradient = ctx.saved_tensors, gradients[0]
        scaled = gradient * scale
        return scaled @ weight, scaled.T @ x, (gradient * (x @ weight.T)).sum(0)


class Layer(nn.Module):
    def __init__(self, alive: weakref.WeakSet[Tensor]) -> None:
        super().__init__()
        self.mlp = MLP(alive)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.mlp(x), None


def passes(count: int) -> tuple[list[list[Tensor]], list[int], int]:
    """Two forward and backward passes: their gradients, and the inputs alive in each layer and between the passes."""
    torch.manual_seed(0)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    layers = nn.ModuleList(Layer(alive) for _ in range(LAYERS))
    gradients, kept = [], 0
    with CpuAsCuda():
        offload = ActivationOffload(layers, count=count, width=WIDTH) if count else None
        for _ in range(2):
            x: Tensor = torch.randn(TOKENS, HIDDEN)
            for layer in layers:
                x, _ = layer(x)
            kept = len(alive)
            x.square().sum().backward()
            assert len(alive) == 0
            gradients.append(
                [parameter.grad.clone() for parameter in layers.parameters() if parameter.grad is not None]
            )
            layers.zero_grad()
        if offload:
            offload.close()
    return gradients, [layer.mlp.most for layer in layers if isinstance(layer, Layer)], kept


@pytest.mark.parametrize("count", [1, 2, LAYERS // 2])
def test_gradients_are_those_without(count: int) -> None:
    torch.testing.assert_close(passes(count)[0], passes(0)[0], rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, LAYERS // 2])
def test_the_device_keeps_the_inputs_of_the_other_layers(count: int) -> None:
    _, most, kept = passes(count)
    assert kept == LAYERS - count
    assert max(most) == LAYERS - count
    assert passes(0)[2] == LAYERS


def test_copies_need_other_layers_to_hide_behind() -> None:
    with pytest.raises(AssertionError, match="hide behind"):
        passes(LAYERS // 2 + 1)
