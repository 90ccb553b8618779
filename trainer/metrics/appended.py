"""A file that grows, on a disk that may refuse for a while: full, read-only, or away."""

import os
from collections.abc import Callable
from pathlib import Path

from kanyun.errors import UserError


class AppendedFile:
    """Appends entries at once. Those that the disk refuses wait in memory, and are written before the next one.

    The file is opened each time: a network disk that comes back knows nothing of files that were open, and says only
    when one is closed that it had no room. It is made once: where its disk is away, a new one would lie below the mount
    point. A process that slept, and was taken for dead, writes nothing over the lines of the run that took its place.
    """

    def __init__(self, path: Path, owns: Callable[[], bool] = lambda: True) -> None:
        """`owns`: whether the file is still this process's to write."""
        self._path, self._owns = path, owns
        self._waiting: list[bytes] = []
        self._end: int | None = None  # bytes of it that are written for sure; None: not made yet

    def write(self, *entries: bytes) -> str:
        """Append entries, after those that wait. Return "", or why the disk refuses."""
        self._waiting += entries
        data = b"".join(self._waiting)
        try:
            if not self._owns():
                return "this run has lost its claim"
            if self._end is None:
                self._path.parent.mkdir(exist_ok=True)
            with self._path.open("ab" if self._end is None else "r+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                self._end = end if self._end is None else self._end
                end = file.seek(min(self._end, end))  # over what an attempt left that was refused
                while data:  # a call may write less
                    written = file.write(data)
                    data, end = data[written:], end + written
        except (OSError, UserError) as error:
            return str(error)
        self._end = end
        self._waiting.clear()
        return ""

    def close(self) -> str:
        """Try once more. Return "", or a sentence about the entries that are lost."""
        refused = self.write() if self._waiting else ""
        return f"the last {len(self._waiting)} entries of {self._path} are lost ({refused})" if refused else ""
