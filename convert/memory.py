"""How tensors pass through memory: into kept memory, and in pieces that a core's cache holds from step to step.

Where a whole tensor is read, then checked, then written, each step waits for main memory; and pages of fresh memory
cost as much CPU time as reading into them.
"""

import threading
from collections.abc import Iterator
from io import FileIO

import torch
from torch import Tensor

from kanyun.errors import UserError

PIECE = 1 << 20  # bytes
KEPT = 1 << 30  # bytes: a layer's largest matrix of 72B; an embedding is larger, and there are two at most


class Scratch(threading.local):
    """A thread's memory for what it reads, kept up to KEPT bytes: what was lent is overwritten by what is lent next."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """Return [size] uint8."""
        if size > KEPT:
            return torch.empty(size, dtype=torch.uint8)
        if len(self._memory) < size:
            self._memory = torch.empty(0, dtype=torch.uint8)  # freed before more is asked for
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size]


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the values in order, flat, PIECE bytes of them at a time; a tensor that is not contiguous is copied."""
    yield from tensor.contiguous().flatten().split(PIECE // tensor.element_size())


def read_into(file: FileIO, begin: int, memory: Tensor) -> None:
    """Fill `memory` [n] uint8 with a file's bytes from `begin`. Raises UserError if the file ends before."""
    file.seek(begin)
    into = memoryview(memory.numpy())
    while into:  # one call reads at most 2 GiB
        count = file.readinto(into)
        if not count:
            raise UserError(f"{file.name} became shorter while it was read: wait until nothing writes it")
        into = into[count:]
