"""The backend of local and mounted disks."""

import os
import posixpath
import shutil
import stat
import time
from collections.abc import Iterator
from typing import IO

from kanyun.storage.backend import Backend, Entry, RandomAccess


class LocalBackend(Backend):
    is_local = True

    def uri(self, path: str) -> str:
        return f"file://{path}"

    def resolve(self, path: str) -> str:
        return os.path.realpath(path)

    def is_mount(self, path: str) -> bool:
        return os.path.ismount(path)

    def stat(self, path: str) -> Entry:
        try:
            return _entry(posixpath.basename(path), os.stat(path), is_link=os.path.islink(path))
        except NotADirectoryError as error:  # path/to/file/name
            raise FileNotFoundError(str(error)) from error

    def list(self, path: str) -> Iterator[Entry]:
        with os.scandir(path) as listing:
            yield from map(_listed, listing)

    def read(self, path: str, offset: int, size: int | None) -> bytes:
        with open(path, "rb") as stream:
            stream.seek(offset)
            return stream.read(-1 if size is None else size)

    def open(self, path: str) -> RandomAccess:
        return _LocalFile(path)

    def create(self, path: str) -> IO[bytes]:
        return open(path, "wb")

    def make(self, path: str) -> None:
        try:
            os.makedirs(path, exist_ok=True)
        except FileNotFoundError as error:  # /proc takes no folder, and says so in this way
            raise PermissionError(str(error)) from error

    def rename(self, source: str, target: str, *, replace: bool) -> None:
        (os.replace if replace else os.rename)(source, target)

    def touch(self, path: str) -> None:
        now = time.time_ns()
        os.utime(path, ns=(now, now))

    def delete(self, path: str) -> None:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


class _LocalFile:
    def __init__(self, path: str):
        self._stream = open(path, "rb", buffering=0)  # noqa: SIM115  # closed with this object

    def read_at(self, offset: int, size: int) -> bytes:
        return os.pread(self._stream.fileno(), size, offset)


def absolute(path: str) -> str:
    """Return the one spelling of a local path: no `.`, no `//`, and `..` where the system finds it.

    `link/..` is the folder above the link's target. Other links stay: a file is known by its link's name.
    """
    result = "/"
    for name in posixpath.join(os.getcwd(), os.path.expanduser(path)).split("/"):
        if name == "..":
            result = posixpath.dirname(os.path.realpath(result) if os.path.islink(result) else result)
        elif name not in ("", "."):
            result = posixpath.join(result, name)
    return result


def _listed(entry: os.DirEntry[str]) -> Entry:
    try:
        status = entry.stat()
    except OSError:  # a link to nowhere, or in a circle
        status = entry.stat(follow_symlinks=False)
    return _entry(entry.name, status, is_link=entry.is_symlink(), is_folder=entry.is_dir(follow_symlinks=False))


def _entry(name: str, status: os.stat_result, *, is_link: bool, is_folder: bool | None = None) -> Entry:
    if is_folder is None:
        is_folder = stat.S_ISDIR(status.st_mode)
    return Entry(name, is_folder, stat.S_ISREG(status.st_mode), is_link, status.st_size, status.st_mtime_ns)
