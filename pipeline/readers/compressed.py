"""A raw file as a stream of its decompressed bytes, by its suffix."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import pyarrow as pa

from kanyun.storage import Folder
from pipeline.readers.base import STEP, Bytes, Split

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_PIECE = 64 << 10  # bytes decompressed at a time: at damage, what has been read of the piece is lost


class _Member(Protocol):
    """What bz2 and lzma offer for one member of a file."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """The same for gzip."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


_MEMBERS: dict[str, Callable[[], _Member]] = {
    ".gz": _Gzip,
    ".tgz": _Gzip,
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}


class _Members:
    """All members of a file: several that `cat` joined, also with zeros between them, with which tools pad.

    Python's own readers, and so tarfile, take what is behind such zeros, or any damage there, for the end of the file.
    """

    def __init__(self, file: Bytes, new: Callable[[], _Member]):
        self._file, self._new, self._member = file, new, new()

    def read(self, size: int) -> bytes:
        """Raises EOFError, OSError, LZMAError or zlib.error where the file is damaged."""
        while True:
            data = b""
            if self._member.eof:
                data = self._member.unused_data.lstrip(b"\0")
                while not data and (more := self._file.read(_PIECE)):
                    data = more.lstrip(b"\0")
                if not data:
                    return b""
                self._member = self._new()
            elif self._member.needs_input:
                data = self._file.read(_PIECE) or b""
            piece = self._member.decompress(data, size)
            if piece:
                return piece
            if not data and not self._member.eof and self._member.needs_input:
                raise EOFError("it ends in the middle")


class _Zstd:
    """zstd, by Arrow. A read that comes upon damage gives nothing, where the other libraries give what they have: then
    what is before it is read anew, byte by byte. A further read would give what happens to be in memory."""

    def __init__(self, open_file: Callable[[], Bytes]):
        self._open = lambda: pa.CompressedInputStream(open_file(), "zstd")
        self._stream, self._position = self._open(), 0
        self._error: OSError | None = None

    def read(self, size: int) -> bytes:
        """Raises OSError where the file is damaged."""
        try:
            data: bytes = b"" if self._error else self._stream.read(size)
        except OSError as error:
            data, self._error = self._before_damage(size), error
        if self._error and not data:
            raise self._error
        self._position += len(data)
        return data

    def _before_damage(self, most: int) -> bytes:
        """Return up to `most` bytes from the position on."""
        stream, left = self._open(), self._position
        while left:
            left -= len(stream.read(min(_PIECE, left)))
        data = b""
        with suppress(OSError):
            while len(data) < most and (byte := stream.read(1)):
                data += byte
        return data


class Decompressed(io.RawIOBase):
    """A compressed file's content. It ends where the file is damaged; `error` tells how."""

    error: Exception | None = None
    position = 0

    def __init__(self, open_source: Callable[[], Any]):
        self._open, self._source = open_source, open_source()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go there by reading: from the beginning, if it is behind."""
        assert whence == io.SEEK_SET
        if offset < self.position:
            self._source, self.position = self._open(), 0
        while self.position < offset and self.read(min(_PIECE, offset - self.position)):
            pass
        return self.position

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(min(len(buffer), _PIECE))
        except (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            self.error, data = error, b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def open_raw(root: Folder, split: Split) -> tuple[io.BufferedReader, Decompressed | None]:
    """Return a whole file as a buffered stream, and its decompression if its suffix names one."""
    name = split.file.lower()
    if name.endswith(".zst"):
        raw = Decompressed(lambda: _Zstd(lambda: Bytes(root, split)))
    elif new := next((new for suffix, new in _MEMBERS.items() if name.endswith(suffix)), None):
        raw = Decompressed(lambda: _Members(Bytes(root, split), new))
    else:
        return io.BufferedReader(Bytes(root, split), STEP), None
    return io.BufferedReader(raw, STEP), raw
