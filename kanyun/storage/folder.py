"""A folder on a local disk or on HDFS, and the files in it.

Errors are the same on both: a permanent error of the storage (permission, quota, safe mode) is a UserError; a missing
file is FileNotFoundError. Transient errors are retried for a minute: a NameNode that restarts is back by then.
"""

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, cast

import xxhash

from kanyun.errors import InvalidPathError, UserError
from kanyun.storage.backend import Backend, Entry
from kanyun.storage.retries import call_with_retry, first_line, retrying, translate_errors
from kanyun.storage.streams import Output, Ranges
from kanyun.storage.uri import locate

_RANGE = 16 << 20  # bytes read at a time
_IN_CACHE = 1 << 20  # the same of a local file that is digested: in half the CPU time


class Folder:
    """A folder on any storage. Methods take names relative to it, with forward slashes; "" is the folder itself."""

    def __init__(self, uri: str):
        """Take a local path, file: or hdfs:// URI. Raises UserError for another URI."""
        self._backend, self.path = locate(str(uri))

    @classmethod
    def _at(cls, backend: Backend, path: str) -> "Folder":
        folder = object.__new__(cls)
        folder._backend, folder.path = backend, path
        return folder

    @property
    def uri(self) -> str:
        """Absolute URI (file:///... or hdfs://host:port/...), as Hadoop writes it."""
        return self._backend.uri(self.path)

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def parent(self) -> "Folder":
        return self._at(self._backend, posixpath.dirname(self.path))

    @property
    def is_local(self) -> bool:
        return self._backend.is_local

    def __truediv__(self, name: str) -> "Folder":
        return self._at(self._backend, self._full(name))

    def __repr__(self) -> str:
        return f"Folder({self.uri})"

    def contains(self, other: "Folder") -> bool:
        """Whether `other` is this folder or lies below it, links followed."""
        mine, others = self.resolved().uri, other.resolved().uri
        return f"{others}/".startswith(f"{mine.rstrip('/')}/")

    def resolved(self) -> "Folder":
        """Return the folder that links lead to."""
        return self._at(self._backend, self._backend.resolve(self.path))

    def is_mount(self) -> bool:
        """Whether a file system begins here, so that the folder cannot be renamed."""
        return self._backend.is_mount(self.path)

    @retrying
    def stat(self, name: str = "") -> Entry:
        """Describe a file or folder, links followed. Raises FileNotFoundError."""
        with self._reading(name):
            return self._backend.stat(self._full(name))

    def exists(self, name: str = "") -> bool:
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def is_folder(self, name: str = "") -> bool:
        try:
            return self.stat(name).is_folder
        except (FileNotFoundError, InvalidPathError):  # a link to itself is no valid path
            return False

    def size(self, name: str) -> int:
        return self.stat(name).size

    def modified(self, name: str) -> int:
        """Return a file's modification time, to be compared with an earlier one only."""
        return self.stat(name).modified

    @retrying
    def names(self) -> list[str]:
        """Return the names of the files and folders directly in it, sorted; none if the folder does not exist."""
        try:
            with self._reading():
                return sorted(entry.name for entry in self._backend.list(self.path))
        except FileNotFoundError:
            return []

    def entries(self) -> Iterator[Entry]:
        """Yield what is directly in it, in no order, as the storage lists it: never all of it in memory.

        Raises UserError if the folder may not be read, or vanishes meanwhile. Transient errors are not retried.
        """
        with self._listing():
            yield from self._backend.list(self.path)

    @retrying
    def files(self) -> list[tuple[str, int]]:
        """Return (relative name, bytes) of every file at any depth, sorted by name. Raises UserError as `entries`."""
        if not self.exists():
            return []
        files, folders = [], [""]
        while folders:
            folder = folders.pop()
            for entry in (self / folder).entries():
                name = posixpath.join(folder, entry.name)
                if entry.is_folder or (entry.is_link and self.is_folder(name)):
                    folders.append(name)
                else:
                    files.append((name, entry.size))
        return sorted(files)

    @retrying
    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Read `size` bytes from `offset` (to the end if None). Fewer come back only at the end of the file."""
        with self._reading(name):
            return self._backend.read(self._full(name), offset, size)

    def ranges(self, name: str) -> Ranges:
        """Return a file of which many ranges are read."""
        return Ranges(lambda: self._backend.open(self._full(name)), lambda: self._reading(name))

    def pieces(self, name: str, step: int = _RANGE) -> Iterator[bytes]:
        """Yield a file's bytes in order, `step` of them at a time."""
        offset = 0
        while data := self.read(name, offset, step):
            yield data
            offset += len(data)

    def digest(self, name: str) -> str:
        """Return the xxh3-128 of a file's bytes."""
        total = xxhash.xxh3_128()
        for piece in self.pieces(name, _IN_CACHE if self.is_local else _RANGE):
            total.update(piece)
        return total.hexdigest()

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for writing, and make its folder; a file that is there is replaced.

        Opening is retried. After a later UnavailableError write the whole file anew, by `call_with_retry`.
        """
        stream = self._create(name)
        try:
            yield cast(IO[bytes], stream)
        finally:
            stream.close()

    @retrying
    def _create(self, name: str) -> Output:
        with self._writing():
            self._backend.make(posixpath.dirname(self._full(name)))
            return Output(self._backend.create(self._full(name)), self._writing)

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file so that a reader sees all of it or none: to a hidden neighbour, then rename."""
        hidden = posixpath.join(posixpath.dirname(name), f".{posixpath.basename(name)}.tmp")
        call_with_retry(lambda: self._write(hidden, data))
        self._rename(self._full(hidden), self._full(name), replace=True)

    def _write(self, name: str, data: bytes) -> None:
        with self.create(name) as stream:
            stream.write(data)

    def move_file(self, name: str, target: "Folder", new_name: str) -> None:
        """Rename a file into another folder of the same storage, replacing what is there: atomic."""
        self._rename(self._full(name), target._full(new_name), replace=True)

    def move_to(self, target: "Folder") -> None:
        """Rename this folder to `target`, which must not exist, on the same storage: atomic."""
        with self._writing():
            if target.exists():
                raise FileExistsError(f"{target.uri} exists")
        self._rename(self.path, target.path, replace=False)

    def _rename(self, source: str, target: str, *, replace: bool) -> None:
        """Raises FileNotFoundError if there is no `source`."""
        attempts = 0

        def rename() -> None:
            nonlocal attempts
            attempts += 1
            with self._writing():
                self._backend.make(posixpath.dirname(target))
                try:
                    self._backend.rename(source, target, replace=replace)
                except FileNotFoundError:
                    if attempts == 1:
                        raise
                    self._backend.stat(target)  # if it is there, the first attempt renamed it and its answer was lost

        call_with_retry(rename)

    @retrying
    def make(self) -> None:
        """Make the folder and those above it, unless they exist."""
        with self._writing():
            self._backend.make(self.path)

    @retrying
    def touch(self, name: str) -> None:
        """Set a file's modification time to now. Raises FileNotFoundError."""
        with self._writing():
            self._backend.touch(self._full(name))

    @retrying
    def delete(self, name: str = "") -> None:
        """Delete a file or a whole folder; nothing happens if it does not exist."""
        with suppress(FileNotFoundError), self._writing():  # another process may delete it as well
            self._backend.delete(self._full(name))

    def _full(self, name: str) -> str:
        return posixpath.join(self.path, name) if name else self.path

    @contextmanager
    def _reading(self, name: str = "") -> Iterator[None]:
        where = f"{self.uri}/{name}" if name else self.uri
        try:
            with translate_errors(f"cannot read {where}", "see whether it is up and you may read it"):
                yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{where} does not exist") from error

    @contextmanager
    def _listing(self) -> Iterator[None]:
        try:
            with self._reading():
                yield
        except FileNotFoundError as error:
            raise UserError(f"{self.uri} changes while it is listed: wait until nothing writes there") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with translate_errors(f"cannot write below {self.uri}", "choose an output you may write to"):
                yield
        except FileNotFoundError as error:
            raise FileNotFoundError(first_line(error)) from error
