"""Rectangles of tensors that a rank writes, and their copy in one kept host buffer. Conversion writes them, too."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from trainer.host_memory import PageLocked
from trainer.optim.remainders import joined

_ALIGNED = 64  # bytes


@dataclass(frozen=True)
class Part:
    """A rectangle of a tensor that this rank writes."""

    key: str
    global_shape: tuple[int, ...]
    at: tuple[int, ...]  # of its first element
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[Tensor, ...]  # its values; or bfloat16 weight and int16 remainder, that are joined to float32

    @property
    def size(self) -> int:
        """Bytes in the checkpoint."""
        return prod(self.shape) * self.dtype.itemsize

    def values(self) -> Tensor:
        """Return the values on the CPU, in a storage of their own."""
        sources = [source.detach().cpu() for source in self.sources]
        values = sources[0] if len(sources) == 1 else joined(*sources)
        return alone(values).view(self.shape)


def alone(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over its bytes alone, not copied if they are contiguous: torch.save writes storages whole."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return torch.frombuffer(flat.numpy(), dtype=tensor.dtype).view(tensor.shape) if len(flat) else tensor


class HostBuffer:
    """Host memory for one copy of this rank's parts, kept for the whole run; page-locked where there is a GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._memory = PageLocked(size, device)

    @property
    def size(self) -> int:
        return len(self._memory.bytes)

    def copy(self, parts: Sequence[Part]) -> list[Part]:
        """Return the parts with their sources copied here. When it returns, the originals may change."""
        begin, copies = 0, []
        for part in parts:
            sources = []
            for source in part.sources:
                here = self._memory.bytes[begin : begin + source.nbytes].view(source.dtype)
                copied = alone(here).view(source.shape)
                copied.copy_(source.detach(), non_blocking=self._memory.locked)
                sources.append(copied)
                begin += _aligned(source.nbytes)
            copies.append(replace(part, sources=tuple(sources)))
        if self._memory.locked:
            torch.cuda.current_stream().synchronize()
        return copies

    def close(self) -> None:
        self._memory.close()


def buffer_size(parts: Sequence[Part]) -> int:
    """Return the bytes that HostBuffer needs for a copy of `parts`."""
    return sum(_aligned(source.nbytes) for part in parts for source in part.sources)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
