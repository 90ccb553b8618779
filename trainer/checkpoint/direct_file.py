"""Files of weights written past the page cache.

Nobody reads them soon, and through the cache a virtual machine pays for every page it has not touched yet: 1.7 GB took
8.0 s to write and flush, and 0.9 s so. On a machine that trains, the cache keeps what it is for.
"""

import mmap
import os
import threading
from types import TracebackType
from typing import Any, Self

BLOCK = 4096  # bytes: offset, size and memory of a direct write are multiples
_BUFFER = 4 << 20  # bytes that one write takes at most
_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A new file on a local disk, written at any place by any thread; or by one from its start to its end.

    What is at the ends of a piece and fills no block is kept until the file is closed. Where the filesystem has no
    direct writes (some network ones), the same writes go through the cache. Raises OSError as the system does.
    """

    def __init__(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags | _DIRECT, 0o666)
        except OSError:  # refused, or not to be written at all: then again
            self._file = os.open(path, flags, 0o666)
        self._edges: dict[int, bytearray] = {}  # by the number of their block
        self._lock, self._mine = threading.Lock(), threading.local()
        self._size = 0  # of the file
        self._at = 0  # where `write` is
        self._waiting = 0  # bytes before it, in the writing thread's buffer

    def pwrite(self, data: Any, offset: int) -> None:
        """Write a buffer of bytes at `offset`."""
        data = memoryview(data).cast("B")
        with self._lock:
            self._size = max(self._size, offset + len(data))
        head = min(-offset % BLOCK, len(data))
        self._keep_edge(data[:head], offset)
        data, offset = data[head:], offset + head
        buffer = self._buffer()
        while len(data) >= BLOCK:
            size = min(len(data), _BUFFER) // BLOCK * BLOCK
            buffer[:size] = data[:size]
            self._write_blocks(buffer[:size], offset)
            data, offset = data[size:], offset + size
        self._keep_edge(data, offset)

    def write(self, data: Any) -> int:
        """Append a buffer of bytes to what was written so far. One thread alone, and nobody calls `pwrite`."""
        data = memoryview(data).cast("B")
        buffer, begin = self._buffer(), 0
        while begin < len(data):
            size = min(len(data) - begin, _BUFFER - self._waiting)
            buffer[self._waiting : self._waiting + size] = data[begin : begin + size]
            self._waiting, begin = self._waiting + size, begin + size
            if self._waiting == _BUFFER:
                self._write_blocks(buffer, self._at)
                self._at, self._waiting = self._at + _BUFFER, 0
        self._size += len(data)
        return len(data)

    def close(self) -> None:
        """Write what was kept, and let the file go; it is not flushed yet."""
        if self._file < 0:
            return
        try:
            buffer = self._buffer()
            if self._waiting:  # what lies behind it in the last block is cut off below
                self._write_blocks(buffer[: -(-self._waiting // BLOCK) * BLOCK], self._at)
            for number, edge in sorted(self._edges.items()):
                buffer[:BLOCK] = edge
                self._write_blocks(buffer[:BLOCK], number * BLOCK)
            os.ftruncate(self._file, self._size)
        finally:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _buffer(self) -> memoryview:
        """Return this thread's memory, which begins at a page."""
        if not hasattr(self._mine, "buffer"):
            self._mine.buffer = memoryview(mmap.mmap(-1, _BUFFER))
        buffer: memoryview = self._mine.buffer
        return buffer

    def _keep_edge(self, data: memoryview, offset: int) -> None:
        if data:
            with self._lock:
                edge = self._edges.setdefault(offset // BLOCK, bytearray(BLOCK))
                edge[offset % BLOCK : offset % BLOCK + len(data)] = data

    def _write_blocks(self, blocks: memoryview, offset: int) -> None:
        while blocks:  # a call may write less, but whole blocks
            written = os.pwrite(self._file, blocks, offset)
            blocks, offset = blocks[written:], offset + written
