"""What a Folder needs of a storage: a handful of calls on absolute paths, with the driver's own errors."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class Entry:
    """A file or folder, as its storage lists it."""

    name: str
    is_folder: bool  # in a listing, a link to a folder is none
    is_file: bool
    is_link: bool
    size: int  # bytes
    modified: int  # ns on a local disk, ms on HDFS: to be compared with values of the same storage only


class RandomAccess(Protocol):
    """An open file, for any thread."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Fewer than `size` bytes come back only at the end of the file."""
        ...


class Backend(ABC):
    """One storage. Methods raise FileNotFoundError for a missing file or folder, with every driver."""

    is_local: ClassVar[bool]

    @abstractmethod
    def uri(self, path: str) -> str:
        """Return the path as Hadoop writes URIs: with its scheme, and without %-escapes."""

    @abstractmethod
    def resolve(self, path: str) -> str:
        """Return the path that links lead to."""

    @abstractmethod
    def is_mount(self, path: str) -> bool:
        """Whether the path cannot be renamed because a file system begins there."""

    @abstractmethod
    def stat(self, path: str) -> Entry:
        """Describe what a path, or the link there, leads to."""

    @abstractmethod
    def list(self, path: str) -> Iterator[Entry]:
        """Yield what is directly in a folder, in no order. Raises NotADirectoryError for a file."""

    @abstractmethod
    def read(self, path: str, offset: int, size: int | None) -> bytes: ...

    @abstractmethod
    def open(self, path: str) -> RandomAccess: ...

    @abstractmethod
    def create(self, path: str) -> Any:
        """Open a file for writing, with `write` and `close`; its folder exists, and a file there is replaced."""

    @abstractmethod
    def make(self, path: str) -> None:
        """Make a folder and those above it, unless they exist."""

    @abstractmethod
    def rename(self, source: str, target: str, *, replace: bool) -> None: ...

    @abstractmethod
    def touch(self, path: str) -> None:
        """Set a file's modification time to now."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Delete a file, a link, or a folder with all that is in it."""
