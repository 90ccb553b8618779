"""Open files of a Folder, whose errors are those of the Folder."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

from fsspec.implementations.local import LocalFileSystem

from kanyun.storage.retries import retried

Guard = Callable[[], AbstractContextManager[None]]  # turns a driver's errors into those of a Folder


class Output:
    """A stream for writing."""

    def __init__(self, stream: Any, guard: Guard):
        self._stream, self._guard = stream, guard

    def write(self, data: bytes) -> int:
        with self._guard():
            return int(self._stream.write(data))

    def close(self) -> None:
        with self._guard():
            self._stream.close()


class Ranges:
    """Many ranges of one file, for any thread. Opened once, which on HDFS spares the NameNode a question a range."""

    def __init__(self, fs: Any, path: str, guard: Guard):
        self._fs, self._path, self._guard = fs, path, guard
        self._stream: Any = None

    def read(self, offset: int, size: int) -> bytes:
        """Fewer bytes only at the end of the file. Patient, and opens the file anew where it could not be read."""
        return retried(lambda: self._read(offset, size))

    def _read(self, offset: int, size: int) -> bytes:
        with self._guard():
            stream = self._stream = self._stream or self._opened()
            try:
                if isinstance(self._fs, LocalFileSystem):
                    return os.pread(stream.fileno(), size, offset)
                size = min(size, stream.size - offset)  # hdfs-native panics beyond the end
                return cast(bytes, stream.read_range(offset, size)) if size > 0 else b""
            except BaseException:
                self._stream = None
                raise

    def _opened(self) -> Any:
        if isinstance(self._fs, LocalFileSystem):
            return open(self._path, "rb", buffering=0)  # closed with this object
        return self._fs.client.read(self._path)
