"""What the vision tower's blocks are made of: the interface, and its reference in torch for a CPU."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import silu

from trainer.kernels.attention import segment_attention
from trainer.kernels.rope import Rotary, rotate

NORM_EPS = 1e-6  # fixed in Qwen2.5-VL, no configuration names it


class VisionLayers(ABC):
    """Makes and runs the parts of a block. All implementations have weights of the same names and shapes."""

    # Of the MLP. SwiGLU, [P, 2 F] -> [P, F]: silu of the first half of the channels times the second.
    activation: Callable[[Tensor], Tensor]

    @abstractmethod
    def linear(self, inputs: int, outputs: int) -> nn.Module:
        """Return a linear layer with `weight` and `bias`."""

    @abstractmethod
    def norm(self, size: int) -> nn.Module:
        """Return an RMSNorm with `weight`."""

    @abstractmethod
    def branch(self, x: Tensor, *modules: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return what `modules`, applied one after the other, make of x, and x itself for the residual."""

    @abstractmethod
    def attend(self, qkv: Tensor, rotary: Rotary, cu_seqlens: Tensor, longest: int) -> Tensor:
        """Return attention within segments, [P, heads, D].

        qkv [P, 3, heads, D] before RoPE; cu_seqlens [segments + 1] int32; `longest`: the most patches a segment has.
        """

    @abstractmethod
    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which the blocks and the merger run."""


class ReferenceVisionLayers(VisionLayers):
    def linear(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs)

    def norm(self, size: int) -> nn.Module:
        return nn.RMSNorm(size, eps=NORM_EPS)

    def branch(self, x: Tensor, *modules: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return reduce(lambda value, module: module(value), modules, x), x

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return silu(gate) * up

    def attend(self, qkv: Tensor, rotary: Rotary, cu_seqlens: Tensor, longest: int) -> Tensor:
        query, key, value = qkv.unbind(1)
        return segment_attention(rotate(query, rotary), rotate(key, rotary), value, cu_seqlens, causal=False)

    def precision(self) -> AbstractContextManager[Any]:
        return nullcontext()
