"""One small interface over local disk and hdfs://: a Folder and the files in it.

fsspec does the work; `hdfs-native` (Rust, no JVM) is its driver for hdfs://. Paths are URIs or plain local paths.
"""

import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

import fsspec
import xxhash

from kanyun.errors import UserError


class Folder:
    """A folder on any storage. Names given to its methods are relative to it, with forward slashes."""

    def __init__(self, uri: str):
        self.fs, path = fsspec.core.url_to_fs(str(uri))
        self.path: str = path.rstrip("/") or "/"

    @property
    def uri(self) -> str:
        """Absolute URI (file:///... or hdfs://host:port/...), as Spark wants it."""
        uri = self.fs.unstrip_protocol(self.path)
        return cast(str, uri)

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def parent(self) -> "Folder":
        return self._at(posixpath.dirname(self.path))

    def __truediv__(self, name: str) -> "Folder":
        return self._at(posixpath.join(self.path, name))

    def __repr__(self) -> str:
        return f"Folder({self.uri})"

    def _at(self, path: str) -> "Folder":
        folder = object.__new__(Folder)
        folder.fs, folder.path = self.fs, path
        return folder

    def _full(self, name: str) -> str:
        return posixpath.join(self.path, name) if name else self.path

    def exists(self, name: str = "") -> bool:
        return bool(self.fs.exists(self._full(name)))

    def names(self) -> list[str]:
        """Names of the files and folders directly below, sorted; empty if the folder does not exist."""
        try:
            return sorted(posixpath.basename(p.rstrip("/")) for p in self.fs.ls(self.path, detail=False))
        except FileNotFoundError:
            return []

    def files(self) -> list[tuple[str, int]]:
        """(relative name, bytes) of every file at any depth, sorted by name."""
        found = self.fs.find(self.path, detail=True)
        return sorted((p[len(self.path) :].lstrip("/"), int(info["size"])) for p, info in found.items())

    def size(self, name: str) -> int:
        return int(self.fs.size(self._full(name)))

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `offset` (to the end if None). Fewer come back only at the end of the file."""
        end = None if size is None else offset + size
        return cast(bytes, self.fs.cat_file(self._full(name), start=offset, end=end))

    def digest(self, name: str, step: int = 16 << 20) -> str:
        """xxh3-128 of a file's bytes, read `step` bytes at a time."""
        total = xxhash.xxh3_128()
        with self.fs.open(self._full(name), "rb", block_size=step) as stream:
            while data := stream.read(step):
                total.update(data)
        return total.hexdigest()

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Open a new file for writing, making its folder. UserError if the storage refuses."""
        with self._writable():
            self.fs.makedirs(posixpath.dirname(self._full(name)), exist_ok=True)
            stream: Any = self.fs.open(self._full(name), "wb")
        with stream:
            yield stream

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file so that a reader sees all of it or none: to a hidden neighbour, then rename."""
        hidden = posixpath.join(posixpath.dirname(name), f".{posixpath.basename(name)}.tmp")
        with self.create(hidden) as stream:
            stream.write(data)
        self._replace(self._full(hidden), self._full(name))

    def move_file(self, name: str, target: "Folder", new_name: str) -> None:
        """Rename a file into another folder of the same storage, replacing what is there: atomic."""
        with self._writable():
            self.fs.makedirs(posixpath.dirname(target._full(new_name)), exist_ok=True)
        self._replace(self._full(name), target._full(new_name))

    def make(self) -> None:
        with self._writable():
            self.fs.makedirs(self.path, exist_ok=True)

    def move_to(self, target: "Folder") -> None:
        """Rename this folder to `target`, which must not exist, on the same storage: atomic."""
        with self._writable():
            self.fs.makedirs(posixpath.dirname(target.path), exist_ok=True)
            self.fs.mv(self.path, target.path, recursive=True)

    def delete(self, name: str = "") -> None:
        """Delete a file or a whole folder; nothing happens if it does not exist."""
        if self.exists(name):
            self.fs.rm(self._full(name), recursive=True)

    def _replace(self, source: str, target: str) -> None:
        with self._writable():
            if self.fs.protocol == "hdfs":
                self.fs.mv(source, target, overwrite=True)
            else:
                os.replace(source, target)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write below {self.uri} ({error}): choose an output you may write to") from error
