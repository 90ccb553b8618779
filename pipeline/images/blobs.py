"""Images of raw rows: located, decoded once in a child process, and copied byte for byte into immutable blobs."""

import os
import posixpath
import re
import uuid
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import IO, Any
from urllib.parse import unquote

import xxhash

from kanyun.errors import AccessDeniedError, InvalidPathError
from kanyun.storage import Folder
from pipeline.checks import MAX_IMAGE_BYTES, Reason, RowError
from pipeline.images.guard import decoder

BLOB_BYTES = 1 << 30  # a task starts another blob after this many
_FILE_URI = re.compile(r"file:(//(localhost)?(?=/))?(?P<path>[^/].*|/[^/].*)", re.DOTALL | re.IGNORECASE)
_REMEMBERED = 4096  # images of a task, about 500 B each: rows that share an image often follow each other


@dataclass(frozen=True)
class CopiedImage:
    """An image in a blob: the fields of schema.IMAGE_REF."""

    blob: str
    offset: int
    size: int
    width: int
    height: int
    digest: bytes  # 16
    looks: int

    def ref(self) -> dict[str, Any]:
        return asdict(self) | {"digest": short_digest(self.digest)}


class ImageCopier:
    """Checks, decodes and copies a task's images. A context manager.

    Blobs are written below `folder`, under names no other task or attempt uses; refs say `uri`, where they will be.
    """

    def __init__(self, root: Folder, folder: Folder, uri: str):
        self._root, self._folder, self._uri = root, folder, uri
        self._real_root = os.path.realpath(root.path) if root.is_local else root.path
        self._remembered: dict[str, CopiedImage] = {}
        self._open = ExitStack()
        self._stream: IO[bytes] | None = None
        self._blob, self._offset = "", 0

    def __enter__(self) -> "ImageCopier":
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    def copy(self, image: str | bytes, file: str) -> CopiedImage:
        """`image`: encoded bytes, or a path relative to the raw file `file`. Raises RowError with the reason."""
        if isinstance(image, bytes):
            return self._copy(image, "an image in the row")
        path = self._resolve(image, file)
        if path not in self._remembered:
            if len(self._remembered) == _REMEMBERED:
                self._remembered.clear()
            self._remembered[path] = self._copy(self._read(path, image), image)
        return self._remembered[path]

    def read(self, image: str | bytes, file: str) -> bytes:
        """Encoded bytes of an image, as `copy` takes it, unchecked. Raises RowError if it cannot be read."""
        return image if isinstance(image, bytes) else self._read(self._resolve(image, file), image)

    def _resolve(self, image: str, file: str) -> str:
        """Full path of the image, which must lie in the raw folder."""
        root, folder = self._root.path, posixpath.join(self._root.path, posixpath.dirname(file))
        uri = _FILE_URI.fullmatch(image) if self._root.is_local else None
        if image.startswith(f"{self._root.uri}/"):  # a URI into the raw folder is as good as a path
            path = root + image.removeprefix(self._root.uri)
        elif "://" in image and not uri:
            raise RowError(Reason.IMAGE_PATH_ESCAPES, f"{image!r} is a URL, a path in the raw folder is needed")
        else:
            path = posixpath.join(folder, uri["path"] if uri else image)
        if uri and "%" in path and not os.path.lexists(path):
            path = posixpath.join(folder, unquote(uri["path"]))
        path = posixpath.normpath(path)
        if path.startswith(f"{self._real_root}/"):  # the raw folder is a link, and the image's path is through no link
            path = root + path.removeprefix(self._real_root)
        if not path.startswith(f"{root}/"):
            raise RowError(Reason.IMAGE_PATH_ESCAPES, f"{image!r} is not in the raw folder {root}")
        if self._root.is_local and "\0" not in path:
            real = os.path.realpath(path)
            file_folder = os.path.realpath(posixpath.join(root, posixpath.dirname(file)))  # through a linked folder
            if not real.startswith((f"{self._real_root}/", f"{file_folder}/", *self._hub_blobs)):
                raise RowError(
                    Reason.IMAGE_PATH_ESCAPES, f"{image!r} is a link to {real}, out of the raw folder {root}"
                )
        return path

    @cached_property
    def _hub_blobs(self) -> tuple[str, ...]:
        """The folder that a snapshot in Hugging Face's cache has links into: REPO/snapshots/X/a.jpg -> REPO/blobs/."""
        repository, snapshots, _ = f"{self._real_root}/".rpartition("/snapshots/")
        return (f"{repository}/blobs/",) if snapshots else ()

    def _read(self, path: str, image: str) -> bytes:
        """Other errors of storage than these are not the row's fault: they fail the task, which Spark tries again."""
        name = path.removeprefix(f"{self._root.path}/")
        try:
            entry = self._root.stat(name)
            if not entry.is_file:
                raise RowError(Reason.IMAGE_MISSING, f"{image!r} is a {'directory' if entry.is_folder else 'device'}")
            _check_bytes(entry.size, image)
            return self._root.read(name)
        except FileNotFoundError as error:
            raise RowError(Reason.IMAGE_MISSING, f"{image!r} does not exist: {path}") from error
        except AccessDeniedError as error:
            raise RowError(Reason.IMAGE_UNREADABLE, f"{image!r} may not be read: {error}") from error
        except InvalidPathError as error:
            raise RowError(Reason.IMAGE_MISSING, f"{image!r:.200} cannot be a path: {error}") from error

    def _copy(self, data: bytes, name: str) -> CopiedImage:
        _check_bytes(len(data), name)
        decoded = decoder().probe(data, name)
        if self._stream is None or self._offset + len(data) > BLOB_BYTES:
            self._open.close()
            self._blob, self._offset = f"{uuid.uuid4().hex}.blob", 0
            self._stream = self._open.enter_context(self._folder.create(self._blob))
        self._stream.write(data)
        copied = CopiedImage(
            blob=f"{self._uri}/{self._blob}",
            offset=self._offset,
            size=len(data),
            width=decoded.width,
            height=decoded.height,
            digest=xxhash.xxh3_128_digest(data),
            looks=decoded.image_hash,
        )
        self._offset += len(data)
        return copied


def thumbnail(data: bytes, side: int) -> bytes | None:
    """Return a JPEG of at most side x side pixels, None if the image cannot be decoded. The child process does it."""
    return decoder().thumbnail(data, side)


def short_digest(digest: bytes) -> int:
    """The part of an image's xxh3-128 that its ref keeps, as Spark has no wider number."""
    return int.from_bytes(digest[:8], "big", signed=True)


def _check_bytes(size: int, name: str) -> None:
    if size > MAX_IMAGE_BYTES:
        raise RowError(Reason.IMAGE_TOO_LARGE, f"{name!r} has {size} bytes, limit {MAX_IMAGE_BYTES}")
