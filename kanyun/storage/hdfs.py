"""The backend of HDFS: hdfs-native (Rust, no JVM). Paths go to it as they are: its names may have # ? % and spaces."""

import posixpath
import time
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

from hdfs_native import Client, FileReader, FileStatus, WriteOptions

from kanyun.storage.backend import Backend, Entry, RandomAccess

# `call_with_retry` waits for a NameNode. By default one call of the driver tries for 3 minutes: with six calls a
# trainer took 18 minutes to say that HDFS is gone. Two more attempts reach any of three NameNodes.
_SETTINGS = {"dfs.client.failover.max.attempts": "2"}


class HdfsBackend(Backend):
    is_local = False

    def __init__(self, authority: str):
        """authority: HOST:PORT, a nameservice, or nothing for the default of Hadoop's configuration."""
        self._root = f"hdfs://{authority}"
        self._client = Client(self._root, _SETTINGS)

    def uri(self, path: str) -> str:
        return self._root + path

    def resolve(self, path: str) -> str:
        return path

    def is_mount(self, path: str) -> bool:
        return path == "/"

    def stat(self, path: str) -> Entry:
        return _entry(self._client.get_file_info(path), path)

    def list(self, path: str) -> Iterator[Entry]:
        for status in self._client.list_status(path):
            if status.path.rstrip("/") == path and not status.isdir:
                raise NotADirectoryError(f"{path} is a file")
            yield _entry(status, status.path)

    def read(self, path: str, offset: int, size: int | None) -> bytes:
        reader = self._client.read(path)
        rest = reader.size - offset
        return _read_at(reader, offset, rest if size is None else size)

    def open(self, path: str) -> RandomAccess:
        """Open a file once for many ranges, so that the NameNode is asked once and not for each range."""
        return _HdfsFile(self._client.read(path))

    def create(self, path: str) -> Any:
        return self._client.create(path, WriteOptions(overwrite=True))

    def make(self, path: str) -> None:
        self._client.mkdirs(path, create_parent=True)

    def rename(self, source: str, target: str, *, replace: bool) -> None:
        self._client.rename(source, target, replace)

    def touch(self, path: str) -> None:
        now = time.time_ns() // 10**6
        self._client.set_times(path, now, now)

    def delete(self, path: str) -> None:
        self._client.delete(path, recursive=True)


@cache
def hdfs(authority: str) -> HdfsBackend:
    """Return the one client of a NameNode. It lives as long as the process.

    To drop a client is to wait for its threads, which a forked child does not have: the child would hang.
    """
    return HdfsBackend(authority)


class _HdfsFile:
    def __init__(self, reader: FileReader):
        self._reader = reader

    def read_at(self, offset: int, size: int) -> bytes:
        return _read_at(self._reader, offset, size)


def _read_at(reader: FileReader, offset: int, size: int) -> bytes:
    size = min(size, reader.size - offset)  # hdfs-native panics beyond the end
    return cast(bytes, reader.read_range(offset, size)) if size > 0 else b""


def _entry(status: FileStatus, path: str) -> Entry:
    return Entry(
        name=posixpath.basename(path),
        is_folder=status.isdir,
        is_file=not status.isdir,
        is_link=False,
        size=status.length,
        modified=status.modification_time,
    )
