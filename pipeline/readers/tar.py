"""Tars as webdataset writes them: consecutive members of one name up to its first dot are one sample."""

import io
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from lzma import LZMAError
from typing import Any

from kanyun.storage import Folder
from pipeline.checks import MAX_IMAGE_BYTES, MAX_ROW, RowError, malformed
from pipeline.readers.base import STEP, Bytes, RawRow, Reader, Split, parse, row_text

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
TEXTS = (".json", ".txt")
_BLOCK = 512  # bytes: what a tar is made of
_MODES = {".tar": "r:", ".tar.gz": "r:gz", ".tgz": "r:gz", ".tar.bz2": "r:bz2", ".tar.xz": "r:xz"}
_DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError)  # errors of the storage are UserErrors
_LINKS = 16  # followed from one member


class WebDataset(Reader):
    """A row is at the byte offset of its first member, and has

    - the fields of the member `KEY.json`,
    - every other member under what follows its first dot (`jpg`, `txt` ...): as text if it is `txt`, else as bytes,
    - in `image` and `images` the bytes of a member in the place of its name (`KEY.jpg`); where `KEY.json` has no
      `images`, they are all members with the suffix of an image, in the order of the tar.

    A link has the bytes of the member that it leads to.
    """

    suffixes = tuple(_MODES)
    splittable = False

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        mode = next(mode for suffix, mode in _MODES.items() if split.file.lower().endswith(suffix))

        def open_tar() -> tarfile.TarFile:
            return tarfile.open(fileobj=io.BufferedReader(Bytes(root, split), STEP), mode=mode)  # type: ignore[call-overload]

        after = 0  # the last row
        try:
            with open_tar() as tar:
                for key, members in groupby(_members(tar, _Links(open_tar)), lambda member: _key(member.name)):
                    row = _row(key, list(members))
                    yield row
                    after = row.position + 1
                end, rest = tar.offset, _after_zeros(tar) is not None
        except _DAMAGE as error:
            yield RawRow(after, "", malformed(f"{split.file} is damaged after its byte {after}: {error}"))
            return
        if rest:  # tarfile takes a header that it cannot read for the end
            yield RawRow(end, "", malformed(f"{split.file} is no tar from its byte {end} on"))


@dataclass(frozen=True)
class _Member:
    offset: int
    name: str
    data: bytes | None  # None: a link that leads to no file in the tar


class _Links:
    """Where the files of a tar lie. Listed at the first link: 0.3 kB a member, which tars without links do not cost."""

    def __init__(self, open_tar: Callable[[], tarfile.TarFile]):
        self._open_tar = open_tar

    @cached_property
    def _places(self) -> dict[str, tuple[int, int] | str]:
        """(offset, size) of a file's bytes, or what a link leads to, by name. Of equal names the last one counts."""
        places: dict[str, tuple[int, int] | str] = {}
        with self._open_tar() as tar:
            for info in _infos(tar):
                if info.isreg():
                    places[posixpath.normpath(info.name)] = info.offset_data, info.size
                elif info.islnk() or info.issym():
                    places[posixpath.normpath(info.name)] = _target(info)
        return places

    def place(self, info: tarfile.TarInfo) -> tuple[int, int] | None:
        """Return (offset, size) of the bytes that a link leads to."""
        place: tuple[int, int] | str | None = _target(info)
        for _ in range(_LINKS):
            if not isinstance(place, str):
                return place
            place = self._places.get(place)
        return None


def _target(info: tarfile.TarInfo) -> str:
    """Return the name of the member that a link leads to: a hard link has it in full, others from their folder."""
    folder = posixpath.dirname(info.name) if info.issym() else ""
    return posixpath.normpath(posixpath.join(folder, info.linkname))


def _infos(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All members; behind the end of a tar those of the next one, where several were joined by `cat`."""
    while True:
        while info := tar.next():
            tar.members.clear()  # type: ignore[attr-defined]  # it would remember all
            yield info
        following = _after_zeros(tar)
        if following in (None, tar.offset):
            return
        tar.offset = following


def _after_zeros(tar: tarfile.TarFile) -> int | None:
    """Return where the first block from `tar.offset` on begins that is not zero; None if there is none."""
    stream, position = tar.fileobj, tar.offset
    assert stream is not None
    stream.seek(position)
    while data := stream.read(STEP):
        if rest := data.lstrip(b"\0"):
            return position + (len(data) - len(rest)) // _BLOCK * _BLOCK
        position += len(data)
    return None


def _members(tar: tarfile.TarFile, links: _Links) -> Iterator[_Member]:
    most = max(MAX_IMAGE_BYTES, MAX_ROW) + 1  # one byte over a limit tells as well as all of them that it is over it
    for info in _infos(tar):
        if posixpath.basename(info.name).startswith("."):
            continue
        if info.isreg():
            stream = tar.extractfile(info)
            assert stream is not None
            yield _Member(info.offset, info.name, stream.read(most))
        elif info.islnk() or info.issym():
            place = links.place(info)
            yield _Member(info.offset, info.name, _read(tar, *place, most) if place else None)


def _read(tar: tarfile.TarFile, offset: int, size: int, most: int) -> bytes:
    assert tar.fileobj is not None
    tar.fileobj.seek(offset)
    return bytes(tar.fileobj.read(min(size, most)))


def _key(name: str) -> str:
    folder, file = posixpath.split(name)
    return posixpath.join(folder, file.partition(".")[0])


def _suffix(name: str) -> str:
    return posixpath.basename(name).partition(".")[2]


def _row(key: str, members: list[_Member]) -> RawRow:
    named = {posixpath.basename(member.name): member.data or b"" for member in members}
    try:
        _refuse_odd(members)
        fields = _fields(key, named)
        return RawRow(members[0].offset, row_text(fields), fields)
    except (RowError, RecursionError) as error:
        texts = {name: data.decode(errors="backslashreplace") for name, data in named.items() if name.endswith(TEXTS)}
        wrong = error if isinstance(error, RowError) else malformed(f"{key}.json is nested too deeply: {error}")
        return RawRow(members[0].offset, row_text(named | texts), wrong)


def _refuse_odd(members: list[_Member]) -> None:
    """Raises RowError: a name twice, a link that leads nowhere, two KEY.json."""
    names = [member.name for member in members]
    for name, times in Counter(names).items():
        if times > 1:
            raise malformed(f"the tar has {times} members named {name}")
    for member in members:
        if member.data is None:
            raise malformed(f"{member.name} is a link that leads to no file in the tar")
    for suffix in ("json", "txt"):
        same = [name for name in names if _suffix(name).lower() == suffix]
        if len(same) > 1:
            raise malformed(f"the tar has {' and '.join(same)}: only one of them can count")


def _fields(key: str, named: dict[str, bytes]) -> dict[str, Any]:
    """The fields of a row. Raises RowError if its JSON or its text is damaged."""
    lowered = Counter(_suffix(name).lower() for name in named)
    by_suffix: dict[str, Any] = {}
    for name, data in named.items():
        suffix = _suffix(name)
        by_suffix[suffix.lower() if lowered[suffix.lower()] == 1 else suffix] = data
    fields = parse(by_suffix.pop("json")) if "json" in by_suffix else {}
    if isinstance(fields, RowError):
        raise fields
    try:
        text = {"txt": by_suffix["txt"].decode()} if "txt" in by_suffix else {}
    except UnicodeDecodeError as error:
        raise malformed(f"{key}.txt has invalid UTF-8 at byte {error.start}") from error
    images = [data for name, data in named.items() if name.lower().endswith(IMAGES)]
    return by_suffix | text | {"images": images} | _with_bytes(fields, named)


def _with_bytes(fields: dict[str, Any], named: dict[str, bytes]) -> dict[str, Any]:
    """`fields`, where `image` and `images` have the bytes of the members that they name."""

    def member(value: Any) -> Any:
        return named.get(value, value) if isinstance(value, str) else value

    return fields | {
        name: [member(one) for one in value] if isinstance(value, list) else member(value)
        for name, value in fields.items()
        if name in ("image", "images")
    }
