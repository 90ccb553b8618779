"""One small interface over local disk and hdfs://: a Folder and the files in it.

fsspec does the work; `hdfs-native` (Rust, no JVM) is its driver for hdfs://. Paths are URIs or plain local paths.
What the storage refuses (permission, quota, safe mode) is a UserError; a missing file is FileNotFoundError. What it
cannot do now, it is asked again for a minute: a NameNode that restarts is back by then.
"""

import os
import posixpath
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import IO, Any, cast

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem
from hdfs_native.fsspec import HdfsFileSystem

from kanyun.errors import UserError
from kanyun.storage.retries import first_line, patient, refused, retried
from kanyun.storage.streams import Output, Ranges


class _Hdfs(HdfsFileSystem):
    """hdfs-native's driver takes paths for URLs: it would cut a file's name at # or ?, and lower-case a nameservice."""

    # fsspec empties its cache of file systems in a forked child; to drop a client there is to wait for its threads,
    # which no fork has: the child, and whoever waits for it (Spark's launcher), would hang. So _hdfs keeps them.
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.partition("://")[2].partition("/")[2] if path.startswith("hdfs://") else path

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        host, _, port = path.partition("://")[2].partition("/")[0].partition(":")
        return {"host": host or None, "port": int(port) if port else None}


# Waiting for a NameNode is `retried`'s. By default a call asks on for 3 minutes and six calls are made: a trainer took
# 18 minutes to say that HDFS is gone. Two more attempts reach any of three NameNodes.
_SETTINGS = {"dfs.client.failover.max.attempts": "2"}


@cache
def _hdfs(host: str | None, port: int | None) -> _Hdfs:
    """One client a NameNode, for as long as the process lives."""
    return _Hdfs(host=host, port=port, **_SETTINGS)


@dataclass(frozen=True)
class Entry:
    """What is directly below a folder."""

    name: str
    is_folder: bool  # a link to one on a local disk is none
    size: int  # bytes
    modified: int  # ns on a local disk, ms on HDFS


class Folder:
    """A folder on any storage. Names given to its methods are relative to it, with forward slashes."""

    def __init__(self, uri: str):
        uri = str(uri)
        with refused(f"cannot use {uri}", "give a local path or hdfs://HOST:PORT/PATH"):
            if uri.startswith("hdfs://"):
                self.fs, path = _hdfs(**_Hdfs._get_kwargs_from_urls(uri)), _Hdfs._strip_protocol(uri)
            else:
                self.fs, path = fsspec.core.url_to_fs(uri)
        self.path: str = str(path).rstrip("/") or "/"

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

    @patient
    def exists(self, name: str = "") -> bool:
        with self._readable():
            return bool(self.fs.exists(self._full(name)))

    @patient
    def names(self) -> list[str]:
        """Names of the files and folders directly below, sorted; empty if the folder does not exist."""
        try:
            with self._readable():
                return sorted(posixpath.basename(str(p).rstrip("/")) for p in self.fs.ls(self.path, detail=False))
        except FileNotFoundError:
            return []

    @patient
    def is_folder(self) -> bool:
        try:
            with self._readable():
                return bool(self.fs.info(self.path)["type"] == "directory")
        except FileNotFoundError:
            return False

    def entries(self) -> Iterator[Entry]:
        """What is directly below, in no order, as the storage lists it: never all of it in memory.

        Raises UserError if the folder may not be read, or goes meanwhile. Not patient: see `retried`.
        """
        with self._listable():
            if isinstance(self.fs, LocalFileSystem):
                with os.scandir(self.path) as found:
                    yield from map(_local_entry, found)
            else:
                for one in self.fs.client.list_status(self.path):
                    yield Entry(posixpath.basename(one.path), one.isdir, one.length, one.modification_time)

    @patient
    def files(self) -> list[tuple[str, int]]:
        """(relative name, bytes) of every file at any depth, sorted by name. Raises UserError as `entries`."""
        if not self.exists():
            return []
        with self._listable():  # by default fsspec leaves out what it cannot list
            facts = self.fs.find(self.path, detail=True, on_error="raise")
        return sorted((path[len(self.path) :].lstrip("/"), int(fact["size"])) for path, fact in facts.items())

    @patient
    def size(self, name: str) -> int:
        with self._readable(name):
            return int(self.fs.size(self._full(name)))

    @patient
    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `offset` (to the end if None). Fewer come back only at the end of the file."""
        with self._readable(name), self.fs.open(self._full(name), "rb") as stream:
            stream.seek(min(offset, stream.size))  # hdfs-native panics beyond the end
            return cast(bytes, stream.read(-1 if size is None else size))

    def ranges(self, name: str) -> Ranges:
        """A file of which many ranges are read."""
        return Ranges(self.fs, self._full(name), lambda: self._readable(name))

    def pieces(self, name: str, step: int = 16 << 20) -> Iterator[bytes]:
        """A file's bytes in order, `step` of them at a time."""
        offset = 0
        while data := self.read(name, offset, step):
            yield data
            offset += len(data)

    def digest(self, name: str) -> str:
        """xxh3-128 of a file's bytes."""
        total = xxhash.xxh3_128()
        for piece in self.pieces(name):
            total.update(piece)
        return total.hexdigest()

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for writing, making its folder; it replaces one that is there.

        Opening is patient. What fails later, UnavailableError tells: the file must be written anew, see `retried`.
        """
        stream = self._open(name)
        try:
            yield cast(IO[bytes], stream)
        finally:
            stream.close()

    @patient
    def _open(self, name: str) -> Output:
        with self._writable():
            self.fs.makedirs(posixpath.dirname(self._full(name)), exist_ok=True)
            return Output(self.fs.open(self._full(name), "wb"), self._writable)

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file so that a reader sees all of it or none: to a hidden neighbour, then rename."""
        hidden = posixpath.join(posixpath.dirname(name), f".{posixpath.basename(name)}.tmp")
        retried(lambda: self._write(hidden, data))
        self._rename(self._full(hidden), self._full(name), replace=True)

    def _write(self, name: str, data: bytes) -> None:
        with self.create(name) as stream:
            stream.write(data)

    def move_file(self, name: str, target: "Folder", new_name: str) -> None:
        """Rename a file into another folder of the same storage, replacing what is there: atomic."""
        self._rename(self._full(name), target._full(new_name), replace=True)

    def move_to(self, target: "Folder") -> None:
        """Rename this folder to `target`, which must not exist, on the same storage: atomic."""
        with self._writable():
            if target.exists():
                raise FileExistsError(f"{target.uri} exists")
        self._rename(self.path, target.path, replace=False)

    def _rename(self, source: str, target: str, replace: bool) -> None:
        """Raises FileNotFoundError if there is no `source`."""
        attempts = 0

        def rename() -> None:
            nonlocal attempts
            attempts += 1
            with self._writable():
                self.fs.makedirs(posixpath.dirname(target), exist_ok=True)
                try:
                    if isinstance(self.fs, LocalFileSystem):
                        (os.replace if replace else os.rename)(source, target)
                    else:
                        self.fs.mv(source, target, overwrite=replace)
                except FileNotFoundError:
                    if attempts == 1 or not self.fs.exists(target):
                        raise  # else the first attempt has done it, and only the answer was lost

        retried(rename)

    @patient
    def make(self) -> None:
        with self._writable():
            self.fs.makedirs(self.path, exist_ok=True)

    @patient
    def touch(self, name: str) -> None:
        """Set a file's time of modification to now. Raises FileNotFoundError."""
        now = time.time_ns()
        with self._writable():
            if isinstance(self.fs, LocalFileSystem):
                os.utime(self._full(name), ns=(now, now))
            else:
                self.fs.client.set_times(self._full(name), now // 10**6, now // 10**6)

    @patient
    def modified(self, name: str) -> float:
        """A file's time of modification, by the clock of who wrote it: to be compared with an earlier one only."""
        with self._readable(name):
            return float(self.fs.modified(self._full(name)).timestamp())

    @patient
    def delete(self, name: str = "") -> None:
        """Delete a file or a whole folder; nothing happens if it does not exist."""
        with suppress(FileNotFoundError), self._writable():  # another process may delete it as well
            if self.fs.exists(self._full(name)):
                self.fs.rm(self._full(name), recursive=True)

    @contextmanager
    def _readable(self, name: str = "") -> Iterator[None]:
        where = f"{self.uri}/{name}" if name else self.uri
        try:
            with refused(f"cannot read {where}", "see whether it is up and you may read it"):
                yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{where} does not exist") from error

    @contextmanager
    def _listable(self) -> Iterator[None]:
        try:
            with self._readable():
                yield
        except FileNotFoundError as error:
            raise UserError(f"{self.uri} changes while it is listed: wait until nothing writes there") from error

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            with refused(f"cannot write below {self.uri}", "choose an output you may write to"):
                yield
        except FileNotFoundError as error:
            raise FileNotFoundError(first_line(error)) from error


def _local_entry(found: os.DirEntry[str]) -> Entry:
    try:
        facts = found.stat()
    except OSError:  # of a link to nowhere, or in a circle
        facts = found.stat(follow_symlinks=False)
    return Entry(found.name, found.is_dir(follow_symlinks=False), facts.st_size, facts.st_mtime_ns)
