"""One small interface over local disk and hdfs://: a Folder and the files in it.

fsspec does the work; `hdfs-native` (Rust, no JVM) is its driver for hdfs://. Paths are URIs or plain local paths.
What the storage refuses (permission, quota, safe mode, no server) is a UserError; a missing file is FileNotFoundError.
"""

import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, Any, cast

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem
from hdfs_native.fsspec import HdfsFileSystem

from kanyun.errors import UserError


class UnavailableError(UserError):
    """The storage could not do it now; later it may."""


def retried[T](action: Callable[[], T]) -> T:
    """`action()`, again after 1, 3 and 9 s if the storage is unavailable.

    hdfs-native 0.14 fails to write a new block if it is told a DataNode that has died but is not missed yet (Java's
    client asks for another one). A file that is written anew may be told others.
    """
    for pause in (1, 3, 9):
        try:
            return action()
        except UnavailableError:
            time.sleep(pause)
    return action()


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


@cache
def _hdfs(host: str | None, port: int | None) -> _Hdfs:
    """One client a NameNode, for as long as the process lives."""
    return _Hdfs(host=host, port=port)


class Folder:
    """A folder on any storage. Names given to its methods are relative to it, with forward slashes."""

    def __init__(self, uri: str):
        uri = str(uri)
        with _refused(f"cannot use {uri}", "give a local path or hdfs://HOST:PORT/PATH"):
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

    def exists(self, name: str = "") -> bool:
        with self._readable():
            return bool(self.fs.exists(self._full(name)))

    def names(self) -> list[str]:
        """Names of the files and folders directly below, sorted; empty if the folder does not exist."""
        try:
            with self._readable():
                return sorted(posixpath.basename(str(p).rstrip("/")) for p in self.fs.ls(self.path, detail=False))
        except FileNotFoundError:
            return []

    def files(self) -> list[tuple[str, int]]:
        """(relative name, bytes) of every file at any depth, sorted by name."""
        with self._readable():
            found = self.fs.find(self.path, detail=True)
        return sorted((p[len(self.path) :].lstrip("/"), int(info["size"])) for p, info in found.items())

    def size(self, name: str) -> int:
        with self._readable(name):
            return int(self.fs.size(self._full(name)))

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `offset` (to the end if None). Fewer come back only at the end of the file."""
        with self._readable(name), self.fs.open(self._full(name), "rb") as stream:
            stream.seek(min(offset, stream.size))  # hdfs-native panics beyond the end
            return cast(bytes, stream.read(-1 if size is None else size))

    def pieces(self, name: str, step: int = 16 << 20) -> Iterator[bytes]:
        """A file's bytes in order, `step` of them at a time."""
        with self._readable(name), self.fs.open(self._full(name), "rb") as stream:
            while data := stream.read(step):
                yield data

    def digest(self, name: str) -> str:
        """xxh3-128 of a file's bytes."""
        total = xxhash.xxh3_128()
        for piece in self.pieces(name):
            total.update(piece)
        return total.hexdigest()

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for writing, making its folder; it replaces one that is there."""
        with self._writable():
            self.fs.makedirs(posixpath.dirname(self._full(name)), exist_ok=True)
            stream = _Output(self, self.fs.open(self._full(name), "wb"))
        try:
            yield cast(IO[bytes], stream)
        finally:
            stream.close()

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file so that a reader sees all of it or none: to a hidden neighbour, then rename."""
        hidden = posixpath.join(posixpath.dirname(name), f".{posixpath.basename(name)}.tmp")
        retried(lambda: self._write(hidden, data))
        self._replace(self._full(hidden), self._full(name))

    def _write(self, name: str, data: bytes) -> None:
        with self.create(name) as stream:
            stream.write(data)

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
            if target.exists():
                raise FileExistsError(f"{target.uri} exists")
            if isinstance(self.fs, LocalFileSystem):
                os.rename(self.path, target.path)
            else:
                self.fs.mv(self.path, target.path)

    def delete(self, name: str = "") -> None:
        """Delete a file or a whole folder; nothing happens if it does not exist."""
        with self._writable():
            if self.exists(name):
                self.fs.rm(self._full(name), recursive=True)

    def _replace(self, source: str, target: str) -> None:
        with self._writable():
            if isinstance(self.fs, LocalFileSystem):
                os.replace(source, target)
            else:
                self.fs.mv(source, target, overwrite=True)

    @contextmanager
    def _readable(self, name: str = "") -> Iterator[None]:
        where = f"{self.uri}/{name}" if name else self.uri
        try:
            with _refused(f"cannot read {where}", "see whether it is up and you may read it"):
                yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{where} does not exist") from error

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            with _refused(f"cannot write below {self.uri}", "choose an output you may write to"):
                yield
        except FileNotFoundError as error:
            raise FileNotFoundError(_first_line(error)) from error


class _Output:
    """A stream for writing, whose errors are a Folder's."""

    def __init__(self, folder: Folder, stream: Any):
        self._folder, self._stream = folder, stream

    def write(self, data: bytes) -> int:
        with self._folder._writable():
            return int(self._stream.write(data))

    def close(self) -> None:
        with self._folder._writable():
            self._stream.close()


@contextmanager
def _refused(what: str, way_out: str) -> Iterator[None]:
    """Errors of the storage as a UserError of one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        # hdfs-native: RuntimeError("RPCError... for what the NameNode refuses, OSError without a number for connections
        lasting = error.errno if isinstance(error, OSError) else str(error).startswith("RPCError")
        kind = UserError if lasting else UnavailableError
        raise kind(f"{what} ({_first_line(error)}): {way_out}") from error


def _first_line(error: Exception) -> str:
    """What RPCError("org.apache...SafeModeException", "Cannot create ...\\n\\tat org...") says, no Java stack."""
    text = re.sub(r'^\w+\(("[\w.$]+", )?"', "", str(error))
    return re.split(r'\\n|\n|"\)$', text)[0].replace('\\"', '"')
