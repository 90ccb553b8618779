"""Tars as webdataset writes them: consecutive members of one name up to its first dot are one sample."""

import io
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from kanyun.storage import Folder
from pipeline.checks import MAX_IMAGE_BYTES, MAX_ROW, RowError, malformed
from pipeline.readers.base import STEP, Bytes, RawRow, Reader, Split, parse, shown

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
TEXTS = (".json", ".txt")
_BLOCK = 512  # bytes: what a tar is made of


class WebDataset(Reader):
    """A row is at the byte offset of its first member, and has

    - the fields of the member `KEY.json`,
    - every other member under what follows its first dot (`jpg`, `txt` ...): as text if it is `txt`, else as bytes,
    - in `image` and `images` the bytes of a member in the place of its name (`KEY.jpg`); where `KEY.json` has no
      `images`, they are all members with the suffix of an image, in the order of the tar.
    """

    suffixes = (".tar",)
    splittable = False

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        behind = 0  # the last row
        try:
            with tarfile.open(fileobj=io.BufferedReader(Bytes(root, split), STEP), mode="r:") as tar:
                for key, members in groupby(_members(tar), lambda member: _key(member.name)):
                    row = _row(key, list(members))
                    yield row
                    behind = row.position + 1
                end = tar.offset
        except (tarfile.TarError, EOFError) as error:
            yield RawRow(behind, "", malformed(f"{split.file} is damaged after its byte {behind}: {error}"))
            return
        if any(root.read(split.file, end, _BLOCK)):  # tarfile takes a header that it cannot read for the end
            yield RawRow(end, "", malformed(f"{split.file} is no tar from its byte {end} on"))


@dataclass(frozen=True)
class _Member:
    offset: int
    name: str
    data: bytes


def _members(tar: tarfile.TarFile) -> Iterator[_Member]:
    while info := tar.next():
        tar.members.clear()  # type: ignore[attr-defined]  # it would remember all
        if info.isfile() and not posixpath.basename(info.name).startswith("."):
            stream = tar.extractfile(info)
            assert stream is not None
            # One byte over a limit tells as well as all of them that it is over it.
            yield _Member(info.offset, info.name, stream.read(max(MAX_IMAGE_BYTES, MAX_ROW) + 1))


def _key(name: str) -> str:
    folder, file = posixpath.split(name)
    return posixpath.join(folder, file.partition(".")[0])


def _row(key: str, members: list[_Member]) -> RawRow:
    named = {posixpath.basename(member.name): member.data for member in members}
    by_suffix = {name.partition(".")[2].lower(): data for name, data in named.items()}
    fields: dict[str, Any] | RowError = parse(by_suffix.pop("json")) if "json" in by_suffix else {}
    if isinstance(fields, dict):
        try:
            text = {"txt": by_suffix["txt"].decode()} if "txt" in by_suffix else {}
        except UnicodeDecodeError as error:
            fields = malformed(f"{key}.txt has invalid UTF-8 at byte {error.start}")
        else:
            images = [data for suffix, data in by_suffix.items() if suffix.endswith(IMAGES)]
            fields = by_suffix | text | {"images": images} | _with_bytes(fields, named)
            return RawRow(members[0].offset, shown(fields), fields)
    texts = {name: data.decode(errors="backslashreplace") for name, data in named.items() if name.endswith(TEXTS)}
    return RawRow(members[0].offset, shown(named | texts), fields)


def _with_bytes(fields: dict[str, Any], named: dict[str, bytes]) -> dict[str, Any]:
    """`fields`, where `image` and `images` have the bytes of the members that they name."""

    def member(value: Any) -> Any:
        return named.get(value, value) if isinstance(value, str) else value

    found = {name: fields[name] for name in ("image", "images") if name in fields}
    return fields | {
        name: [member(one) for one in value] if isinstance(value, list) else member(value)
        for name, value in found.items()
    }
