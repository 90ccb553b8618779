"""Activation offloading: inputs of SwiGLU wait in host memory for their backward pass.

They are half of what a decoder layer keeps. A copy engine carries them over PCIe beside the matrix products, which
costs next to no time as long as the copies of a forward pass take no longer than the pass; to recompute a layer costs a
third of it. As in Transformer Engine's schedule (cpu_offload.py), N - K layers may hold their inputs at any time if K
of N are offloaded: a copy is not waited for before it has had N - K layers' time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from trainer.host_memory import PageLocked


class _Copied(NamedTuple):
    """A tensor on the device that a copy reads or writes, and the event after the copy."""

    tensor: Tensor
    event: torch.cuda.Event


class ActivationOffload:
    """Offloads SwiGLU's inputs, of `width` columns, of the first `count` of `layers`, at most half of them.

    Works in a CUDA graph. The host memory is taken in the first forward pass and kept until `close`.
    """

    def __init__(self, layers: nn.ModuleList, *, count: int, width: int) -> None:
        assert 0 < count <= len(layers) // 2, "the copies hide behind the other layers"
        self._width = width
        self._behind = len(layers) - count  # a layer's copy out may take the time of as many layers' forward passes
        # Copies back begin in the middle of the backward pass. One takes as long as N / 2K layers at most, if PCIe
        # carries K layers' inputs out in the forward pass of N layers, which takes half as long as the backward pass.
        self._lead = len(layers) // 2 - count + 1
        self._outward, self._homeward = torch.cuda.Stream(), torch.cuda.Stream()
        # By the layer's number.
        self._host: dict[int, PageLocked] = {}
        self._leaving: dict[int, _Copied] = {}
        self._away: dict[int, Callable[[], Tensor]] = {}
        self._returning: dict[int, _Copied] = {}
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._before_forward(number))
            layer.register_forward_hook(self._after_forward(number))
        for number, layer in enumerate(layers[:count]):
            mlp: Any = layer.mlp
            mlp.saved_tensors = partial(saved_tensors_hooks, partial(self._pack, number), self._unpack)

    def close(self) -> None:
        """Give the host memory back."""
        for memory in self._host.values():
            memory.close()
        self._host.clear()

    def _before_forward(self, layer: int) -> Callable[..., None]:
        return lambda *_: self._release(layer - self._behind)

    def _after_forward(self, layer: int) -> Callable[..., None]:
        """The gradient of a layer's output begins its backward pass, which frees what the layer has kept."""

        def begin_backward(gradient: Tensor) -> None:
            self._fetch(layer - self._lead)

        def hook(module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
            if output[0].requires_grad:
                output[0].register_hook(begin_backward)

        return hook

    def _pack(self, number: int, tensor: Tensor) -> Tensor | int:
        """Begin to copy a SwiGLU input to the host; autograd keeps the layer's number in its place."""
        # Other saved tensors can have this width: vectors of norms, transposed 8-bit operands, parameters.
        wide = tensor.dim() > 1 and tensor.shape[-1] == self._width
        if not wide or not tensor.is_floating_point() or isinstance(tensor, nn.Parameter):
            return tensor
        assert number not in self._leaving, "a second tensor of this width"
        self._outward.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(self._outward):
            self._memory(number, tensor).copy_(tensor, non_blocking=True)
            self._leaving[number] = _Copied(tensor, _recorded())
        return number

    def _memory(self, number: int, like: Tensor) -> Tensor:
        if number not in self._host:
            self._host[number] = PageLocked(like.nbytes, like.device)
        return self._host[number].bytes.view(like.dtype).view(like.shape)

    def _release(self, number: int) -> None:
        """Wait for the copy to the host, and let go of the device's tensor."""
        if number in self._leaving:
            tensor, event = self._leaving.pop(number)
            event.wait()
            self._away[number] = partial(torch.empty, tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def _fetch(self, number: int) -> None:
        """Begin to copy a tensor back."""
        if number in self._away:
            # Allocated on the current stream, which frees it: the allocator has a pool for each stream.
            tensor = self._away.pop(number)()
            self._homeward.wait_stream(torch.cuda.current_stream())
            with torch.no_grad(), torch.cuda.stream(self._homeward):
                tensor.copy_(self._memory(number, tensor), non_blocking=True)
                self._returning[number] = _Copied(tensor, _recorded())

    def _unpack(self, kept: Tensor | int) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        tensor, event = self._returning.pop(kept)
        event.wait()
        return tensor


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event
