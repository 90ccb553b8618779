"""A raw file as a stream of its decompressed bytes, by its suffix."""

import io
import lzma
from typing import Any

import pyarrow as pa

from kanyun.storage import Folder
from pipeline.readers.base import STEP, Bytes, Split

_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
COMPRESSED = tuple(_CODECS)
_PIECE = 64 << 10  # bytes decompressed at a time: at damage, what has been read of the piece is lost


class Decompressed(io.RawIOBase):
    """A compressed stream that ends where it is damaged; `error` tells how."""

    error: Exception | None = None
    position = 0

    def __init__(self, source: Any):
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(min(len(buffer), _PIECE))
        except (pa.ArrowException, OSError, EOFError, lzma.LZMAError) as error:
            self.error, data = error, b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def open_raw(root: Folder, split: Split) -> tuple[io.BufferedReader, Decompressed | None]:
    """Return a whole file as a buffered stream, and its decompression if its suffix names one."""
    file = Bytes(root, split)
    codec = next((codec for suffix, codec in _CODECS.items() if split.file.lower().endswith(suffix)), None)
    if codec is None:
        return io.BufferedReader(file, STEP), None
    if codec == "xz":
        raw = Decompressed(lzma.LZMAFile(io.BufferedReader(file, STEP)))  # noqa: SIM115
    else:
        raw = Decompressed(pa.CompressedInputStream(file, codec))
    return io.BufferedReader(raw, STEP), raw
