"""How tensors pass through memory: into kept memory, and in pieces that a core's cache holds from step to step.

Where a whole tensor is read, then checked, then written, each step waits for main memory; and pages of fresh memory
cost as much CPU time as reading into them.
"""

import os
import threading
from collections.abc import Iterator
from io import FileIO, RawIOBase
from typing import Any

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


def is_finite(piece: Tensor) -> bool:
    """Return whether no value of a contiguous bfloat16 or float32 tensor is NaN or infinite.

    Those have an exponent of ones: as signed integers the positive ones are the largest, as unsigned the negative ones.
    0.24 s of CPU time for a GB of bfloat16, torch's aminmax 0.43 (one run each, on a busy machine).
    """
    short = piece.element_size() == 2
    bits: Any = piece.view(torch.int16 if short else torch.int32).numpy()
    infinity = 0x7F80 if short else 0x7F800000
    sign = 0x8000 if short else 0x80000000
    return not bits.size or bool(bits.max() < infinity and bits.view(f"u{bits.dtype}").max() < sign + infinity)


def read_into(file: FileIO, begin: int, memory: Tensor) -> None:
    """Fill `memory` [n] uint8 with a file's bytes from `begin`; threads may read one file at once.

    Raises UserError if the file ends before.
    """
    into = memoryview(memory.numpy())
    while into:  # one call reads at most 2 GiB
        count = os.preadv(file.fileno(), [into], begin)
        if not count:
            raise UserError(f"{file.name} became shorter while it was read: wait until nothing writes it")
        into, begin = into[count:], begin + count


class MemoryFile(RawIOBase):
    """Memory [n] uint8, not copied, as a file that torch.load takes."""

    def __init__(self, memory: Tensor) -> None:
        self._bytes, self._at = memoryview(memory.numpy()), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._bytes)}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = self._bytes[self._at : self._at + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
