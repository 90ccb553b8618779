"""Tars as webdataset writes them: consecutive members of one name up to its first dot are one sample."""

import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kanyun.storage import Folder
from pipeline.checks import MAX_IMAGE_BYTES, MAX_ROW, RowError, malformed
from pipeline.readers.base import BOM, STEP, RawRow, Reader, Split, parse, row_text
from pipeline.readers.compressed import COMPRESSED, open_raw
from pipeline.readers.lines import damage

IMAGES = ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "heic")
TEXTS = (".json", ".txt")
_KNOWN = (*TEXTS, *(f".{suffix}" for suffix in IMAGES))
_BLOCK = 512  # bytes: what a tar is made of
_DAMAGE = (tarfile.TarError, EOFError, OSError)  # errors of the storage are UserErrors
_LINKS = 16  # followed from one member


class WebDataset(Reader):
    """A row is at the byte offset of its first member, and has

    - the fields of the member `KEY.json`,
    - every other member under what follows its first dot (`jpg`, `txt` ...): as text if it is `txt`, else as bytes,
    - in `images`, where `KEY.json` names no images, all members with the suffix of an image, in the order of the tar.

    An image may be named as a member is (`KEY.jpg`). A link has the bytes of the member that it leads to. What is
    hidden is left out, see `_is_hidden`.
    """

    suffixes = (".tar", ".tgz", *(f".tar{compressed}" for compressed in COMPRESSED))
    splittable = False

    def rows(self, root: Folder, split: Split) -> Iterator[RawRow]:
        stream, decompressed = open_raw(root, split)
        links = _Links(lambda: tarfile.open(fileobj=open_raw(root, split)[0], mode="r:"))  # noqa: SIM115
        sample: list[_Member] = []
        after = 0  # the last row
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in _members(tar, links):
                    if sample and _key(member.name) != _key(sample[0].name):
                        yield _row(sample)
                        after, sample = sample[0].offset + 1, []
                    sample.append(member)
                if sample:
                    yield _row(sample)
                end, rest = tar.offset, _after_zeros(tar) is not None
        except _DAMAGE as error:
            cause = (decompressed and decompressed.error) or error
            wrong = malformed(f"{split.file} is damaged after its byte {after}: {cause}")
            yield RawRow(after, _text(sample), wrong)  # what was read of a sample, which may have had more members
            return
        yield from damage(decompressed)
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
        if _is_hidden(posixpath.basename(info.name)):
            continue
        name = posixpath.normpath(info.name)  # `tar -r` appends x.json to a tar of ./x.jpg
        if info.isreg():
            stream = tar.extractfile(info)
            assert stream is not None
            yield _Member(info.offset, name, stream.read(most))
        elif info.islnk() or info.issym():
            place = links.place(info)
            yield _Member(info.offset, name, _read(tar, *place, most) if place else None)


def _is_hidden(file: str) -> bool:
    """What a Mac or an editor leaves. A member that is called `.jpg` or `.json` is one of a row whose key is empty."""
    return file.startswith("._") or (file.startswith(".") and not file.lower().endswith(_KNOWN))


def _read(tar: tarfile.TarFile, offset: int, size: int, most: int) -> bytes:
    assert tar.fileobj is not None
    tar.fileobj.seek(offset)
    return bytes(tar.fileobj.read(min(size, most)))


def _key(name: str) -> str:
    folder, file = posixpath.split(name)
    return posixpath.join(folder, file.partition(".")[0])


def _suffix(name: str) -> str:
    return posixpath.basename(name).partition(".")[2]


def _row(members: list[_Member]) -> RawRow:
    key = _key(members[0].name)
    named = {posixpath.basename(member.name): member.data or b"" for member in members}
    try:
        _refuse_odd(members)
        fields = _fields(key, named)
        in_full = {member.name: member.data or b"" for member in members}
        return RawRow(members[0].offset, row_text(fields), fields, named | in_full)
    except (RowError, RecursionError) as error:
        wrong = error if isinstance(error, RowError) else malformed(f"{key}.json is nested too deeply: {error}")
        return RawRow(members[0].offset, _text(members), wrong)


def _text(members: list[_Member]) -> str:
    """Return members of which no row can be made as a row's text."""
    named = {posixpath.basename(member.name): member.data or b"" for member in members}
    texts = {name: data.decode(errors="backslashreplace") for name, data in named.items() if name.endswith(TEXTS)}
    return row_text(named | texts)


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
        text = {"txt": by_suffix["txt"].removeprefix(BOM).decode()} if "txt" in by_suffix else {}
    except UnicodeDecodeError as error:
        raise malformed(f"{key}.txt has invalid UTF-8 at byte {error.start}") from error
    if _names_images(fields, named):
        return by_suffix | text | fields
    images = [data for name, data in named.items() if name.lower().endswith(IMAGES)]
    return by_suffix | text | fields | {"images": images}


def _names_images(fields: Mapping[str, Any], named: Mapping[str, bytes]) -> bool:
    """Whether KEY.json says which images its row has: in `images`, in `image`, or within its messages."""
    if fields.get("images") is not None or fields.get("image"):
        return True
    lists = [value for value in fields.values() if isinstance(value, list)]
    return any(posixpath.basename(text) in named for text in _texts(lists))


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list():
            for one in value:
                yield from _texts(one)
        case dict():
            for one in value.values():
                yield from _texts(one)
