"""Where a path that a person gave becomes a backend and a normalised path: here, and nowhere else."""

import posixpath
import re

from kanyun.errors import UserError
from kanyun.storage.backend import Backend
from kanyun.storage.hdfs import hdfs
from kanyun.storage.local import LocalBackend, absolute
from kanyun.storage.retries import translate_errors

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//?)")
_HDFS = re.compile(r"hdfs://((?:[^/:@]+(?::\d+)?)?)(/.*)?", re.DOTALL)
_KNOWN = "give a local path or hdfs://HOST:PORT/PATH"
_LOCAL = LocalBackend()


def locate(uri: str) -> tuple[Backend, str]:
    """Return the backend and the path of a local path, a file: URI or an hdfs:// URI.

    Paths are the same however they were spelt (`../x/raw`, `raw/.`, `a//b`). Raises UserError for other URIs, and for
    an empty path: a script's variable that is not set would else be the current folder, to be read, or replaced.
    """
    if not uri:
        raise UserError(f"a path is empty: {_KNOWN}, and . for the current folder")
    if uri != uri.strip() and _is_uri(uri.strip()):
        raise UserError(f"cannot use {uri!r} (spaces around it): give {uri.strip()}")
    if not _is_uri(uri):
        return _LOCAL, absolute(uri)
    scheme = uri.partition(":")[0]
    if scheme == "file":
        path = uri.removeprefix("file:").removeprefix("//")
        if not path.startswith("/"):
            raise UserError(f"cannot use {uri} (a host or a relative path): give file:///PATH or the path alone")
        return _LOCAL, absolute(path)
    if scheme == "hdfs" and (parts := _HDFS.fullmatch(uri)):
        with translate_errors(f"cannot use {uri}", _KNOWN):
            return hdfs(parts[1]), posixpath.normpath("/" + (parts[2] or "").lstrip("/"))
    if scheme.lower() in ("hdfs", "file"):
        right = _right_spelling(uri)
        raise UserError(f"cannot use {uri} (wrong spelling): give {right}, or ./{uri} for a local folder of that name")
    raise UserError(f"cannot use {uri} ({scheme}: URIs are not supported): {_KNOWN}")


def _is_uri(path: str) -> bool:
    return _SCHEME.match(path) is not None or path.lower().startswith(("hdfs:", "file:"))


def _right_spelling(uri: str) -> str:
    scheme, _, rest = uri.partition(":")
    path = rest.lstrip("/")
    if scheme.lower() == "file":
        return f"file:///{path}"
    lower = f"hdfs:{rest}"
    return lower if lower != uri and _HDFS.fullmatch(lower) else f"hdfs://HOST:PORT/{'PATH' if '//' in rest else path}"
