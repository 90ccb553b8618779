"""Open files of a Folder, whose errors are those of the Folder."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from kanyun.storage.backend import RandomAccess
from kanyun.storage.retries import call_with_retry

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
    """Many ranges of one file, for any thread. The file is opened once, and again after an error."""

    def __init__(self, open_file: Callable[[], RandomAccess], guard: Guard):
        self._open_file, self._guard = open_file, guard
        self._file: RandomAccess | None = None

    def read(self, offset: int, size: int) -> bytes:
        """Read a range; fewer bytes come back only at the end of the file. Transient errors are retried."""
        return call_with_retry(lambda: self._read(offset, size))

    def _read(self, offset: int, size: int) -> bytes:
        with self._guard():
            file = self._file = self._file or self._open_file()
            try:
                return file.read_at(offset, size)
            except BaseException:
                self._file = None
                raise
