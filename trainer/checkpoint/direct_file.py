"""Files of weights written past the page cache.

Nobody reads them soon, and through the cache a virtual machine pays for every page it has not touched yet: a flushed
copy of 6.2 GB took cp 7.6 to 9.8 s, and dd past the cache 4.8 to 7.5 s (four and three runs, nothing else running).
"""

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

BLOCK = 4096  # bytes: offset, size and memory of a direct write are multiples
_BUFFER = 4 << 20  # bytes that one write takes
_DIRECT = getattr(os, "O_DIRECT", 0)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Name the file in errors of calls that know it by its number alone. Raises OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


class DirectFile:
    """A new file on a local disk, written by `Region`s; threads write one each.

    Where the filesystem refuses direct writes (some network ones), when it opens the file or at the first write, the
    same writes go through the cache. Raises OSError as the system does.
    """

    def __init__(self, path: str, size: int = 0) -> None:
        """`size`: bytes that are known to come; so the disk lays them out at once, and regions are written at once."""
        self._path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags | _DIRECT, 0o666)
        except OSError:  # refused, or not to be written at all: then again
            self._file = os.open(path, flags, 0o666)
        if size:
            try:
                with naming(path):
                    os.posix_fallocate(self._file, 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # those that cannot lay out what is to come
                    self._let_go()
                    raise
        self._edges: dict[int, bytearray] = {}  # number of a block -> its bytes, which several regions may share
        self._lock, self._mine = threading.Lock(), threading.local()
        self._size = 0

    def region(self, offset: int = 0) -> "Region":
        """Return what writes from `offset` on. A thread has one at a time."""
        if not hasattr(self._mine, "buffer"):
            self._mine.buffer = memoryview(mmap.mmap(-1, _BUFFER))
        return Region(self, offset, self._mine.buffer)

    def close(self) -> None:
        """Write the blocks that regions share, and let the file go; it is not flushed yet."""
        if self._file < 0:
            return
        try:
            buffer = memoryview(mmap.mmap(-1, BLOCK))
            for number, edge in sorted(self._edges.items()):
                buffer[:] = edge
                self.write_blocks(buffer, number * BLOCK)
            with naming(self._path):
                os.ftruncate(self._file, self._size)  # the last block may be longer
        finally:
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._file >= 0:
            self._let_go()

    def write_blocks(self, blocks: memoryview, offset: int) -> None:
        """Write whole blocks from memory that begins at a page."""
        while blocks:  # a call may write less, but whole blocks
            # Asked for before: once it is refused, another thread may change it at any time.
            flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
            try:
                with naming(self._path):
                    written = os.pwrite(self._file, blocks, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not flags & _DIRECT:
                    raise
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~_DIRECT)
                continue
            blocks, offset = blocks[written:], offset + written

    def keep_edge(self, data: memoryview, offset: int) -> None:
        """Keep bytes of one block until the file is closed."""
        if data:
            with self._lock:
                edge = self._edges.setdefault(offset // BLOCK, bytearray(BLOCK))
                edge[offset % BLOCK : offset % BLOCK + len(data)] = data

    def ends_at(self, end: int) -> None:
        """Note that bytes up to `end` were written."""
        with self._lock:
            self._size = max(self._size, end)

    def _let_go(self) -> None:
        os.close(self._file)
        self._file = -1


class Region:
    """Bytes of a file one behind the other. What fills no block at its two ends is kept by the file."""

    def __init__(self, file: DirectFile, offset: int, buffer: memoryview) -> None:
        self._file, self._buffer = file, buffer
        self._at = offset // BLOCK * BLOCK  # where the buffer goes
        self._begin = self._filled = offset % BLOCK  # bytes of the buffer: another region's, and all

    def write(self, data: Any) -> int:
        """Append a buffer of bytes; return their number."""
        data = memoryview(data).cast("B")
        begin = 0
        while begin < len(data):
            size = min(len(data) - begin, _BUFFER - self._filled)
            self._buffer[self._filled : self._filled + size] = data[begin : begin + size]
            self._filled, begin = self._filled + size, begin + size
            if self._filled == _BUFFER:
                self._write()
        return len(data)

    def close(self) -> None:
        """Write what the buffer holds."""
        self._write()

    def _write(self) -> None:
        begin, end = self._begin, self._filled
        if begin:  # the first block is shared with the region before
            shared = min(end, BLOCK)
            self._file.keep_edge(self._buffer[begin:shared], self._at + begin)
            begin = BLOCK
        whole = end // BLOCK * BLOCK
        if whole > begin:
            self._file.write_blocks(self._buffer[begin:whole], self._at + begin)
        if end > max(whole, begin):
            self._file.keep_edge(self._buffer[whole:end], self._at + whole)
        self._file.ends_at(self._at + end)
        self._at, self._begin, self._filled = self._at + _BUFFER, 0, 0
