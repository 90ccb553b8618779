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
_PIECE = 64 << 10  # bytes decompressed at a time
_DAMAGE = (pa.ArrowException, OSError, zlib.error, lzma.LZMAError)  # errors of the storage are UserErrors


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


# Suffix -> (a member's decompressor, how a member starts).
_MEMBERS: dict[str, tuple[Callable[[], _Member], bytes]] = {
    ".gz": (_Gzip, b"\x1f\x8b"),
    ".tgz": (_Gzip, b"\x1f\x8b"),
    ".bz2": (bz2.BZ2Decompressor, b"BZh"),
    ".xz": (lzma.LZMADecompressor, b"\xfd7zXZ"),
}
_CUT, _OTHER_BYTES = "it ends in the middle", "other bytes follow"
_ARROW_SAYS = {"Truncated": _CUT, "Unknown frame descriptor": _OTHER_BYTES}  # of zstd


class _Members:
    """All members of a file: several that `cat` joined, also with zeros between them, with which tools pad.

    Python's own readers, and so tarfile, take what is behind such zeros, or any damage there, for the end of the file.
    """

    def __init__(self, file: Bytes, new: Callable[[], _Member], start: bytes):
        self._file, self._new, self._start, self._member = file, new, start, new()

    def read(self, size: int) -> bytes:
        """Raises EOFError behind what is sound, OSError, LZMAError or zlib.error where the file is damaged."""
        while True:
            data = b""
            if self._member.eof:
                data = self._member.unused_data.lstrip(b"\0")
                while not data and (more := self._file.read(_PIECE)):
                    data = more.lstrip(b"\0")
                if not data:
                    return b""
                if not data.startswith(self._start[: len(data)]):
                    raise EOFError(_OTHER_BYTES)
                self._member = self._new()
            elif self._member.needs_input:
                data = self._file.read(_PIECE) or b""
            piece = self._member.decompress(data, size)
            if piece:
                return piece
            if not data and not self._member.eof and self._member.needs_input:
                raise EOFError(_CUT)


class Decompressed(io.RawIOBase):
    """A compressed file's content. It ends where the file is damaged; `error` tells how.

    An EOFError there is a file that is cut, or has other bytes behind it: what is before is sound.
    """

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
            self._source, self.position, self.error = self._open(), 0, None
        while self.position < offset and self.read(min(_PIECE, offset - self.position)):
            pass
        return self.position

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), _PIECE)
        try:
            data = b"" if self.error else self._source.read(size)
        except EOFError as error:
            data, self.error = b"", error
        except _DAMAGE as error:
            self.error = next((EOFError(say) for text, say in _ARROW_SAYS.items() if text in str(error)), error)
            data = self._before_damage(size)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def _before_damage(self, most: int) -> bytes:
        """Return what is there between the position and the damage, read anew and byte by byte.

        A read that comes upon damage gives nothing: of a small file that is all rows. Arrow's stream must not be read
        behind an error: it would give what happens to be in memory.
        """
        source, left = self._open(), self.position
        while left and (piece := source.read(min(_PIECE, left))):
            left -= len(piece)
        data = bytearray()
        with suppress(*_DAMAGE):
            while len(data) < most and (byte := source.read(1)):
                data += byte
        return bytes(data)


def open_raw(root: Folder, split: Split) -> tuple[io.BufferedReader, Decompressed | None]:
    """Return a whole file as a buffered stream, and its decompression if its suffix names one."""
    decompressed = _decompressed(root, split)
    return io.BufferedReader(decompressed or Bytes(root, split), STEP), decompressed


def uncertain(root: Folder, split: Split) -> str | None:
    """Return why no row of a compressed file is certain; None where those that can be read are sound.

    A checksum comes behind what it is of, and a changed byte gives other words until then: of 5,000 rows in gzip it
    left 2,480 that are JSON, 5 of them wrong. So the file is read twice, which is 1 % of preprocess's CPU time for gzip
    and 9 % for bzip2.
    """
    decompressed = _decompressed(root, split)
    while decompressed and decompressed.read(_PIECE):
        pass
    if decompressed is None or isinstance(decompressed.error, EOFError | None):
        return None
    return f"{split.file} is damaged, so none of its rows is certain: {decompressed.error}"


def _decompressed(root: Folder, split: Split) -> Decompressed | None:
    name = split.file.lower()
    if name.endswith(".zst"):
        return Decompressed(lambda: pa.CompressedInputStream(Bytes(root, split), "zstd"))
    member = next((member for suffix, member in _MEMBERS.items() if name.endswith(suffix)), None)
    return Decompressed(lambda: _Members(Bytes(root, split), *member)) if member else None
