"""A file that lines are appended to, on a disk that may be full for a while."""

import os
from pathlib import Path


class Lines:
    """Appends lines at once. Those that the disk refuses wait in memory, and are written before the next one."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting = path, b""
        self._file = path.open("ab", buffering=0)

    def write(self, line: str = "") -> str:
        """Append a line, after those that wait. Return "", or why the disk refuses."""
        self._waiting += line.encode()
        try:
            while self._waiting:  # a call may write less
                self._waiting = self._waiting[os.write(self._file.fileno(), self._waiting) :]
        except OSError as error:
            return str(error)
        return ""

    def close(self) -> str:
        """Try once more. Return "", or a sentence about the lines that are lost."""
        refused, count = self.write(), self._waiting.count(b"\n")
        self._file.close()
        return f"{count} line(s) of {self._path} could not be written ({refused}): make room there" if refused else ""
