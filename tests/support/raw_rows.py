"""Raw files of several formats for tests of readers and stages, and the rows that a reader makes of them."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from kanyun.storage import Folder
from pipeline.readers import RawRow, plan, read


def rows_of(path: Path, step: int = 1 << 20) -> list[RawRow]:
    tasks = plan([(path.name, path.stat().st_size)], step)
    return [row for task in tasks for split in task for row in read(Folder(str(path.parent)), split)]


def zstd(data: bytes) -> bytes:
    compressed: bytes = pa.compress(data, codec="zstd", asbytes=True)
    return compressed


COMPRESS = {
    "gz": gzip.compress,
    "zst": zstd,
    "bz2": bz2.compress,
    "xz": partial(lzma.compress, preset=0),
}  # by default it is as slow as all others together


def tar(members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def fields(row: RawRow) -> dict[str, Any]:
    assert isinstance(row.fields, dict), row.fields
    return row.fields


def write_lines(path: Path, rows: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(rows) + b"\n")


def lines(rows: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(row, ensure_ascii=False).encode() for row in rows]
