"""A raw folder: its files of rows, a digest of everything in it, and what is left out."""

import posixpath
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, partial

import xxhash

from kanyun.errors import UserError
from kanyun.storage import Folder
from kanyun.storage.backend import Entry
from kanyun.storage.links import Links
from kanyun.storage.retries import call_with_retry
from pipeline.readers import IMAGES, SUFFIXES, holds_rows

HIDDEN = (".", "_", "cache-")  # how files and folders start that are no data; the last is what datasets.map leaves
HIDDEN_NAMES = "files of rows, and folders, with names that begin with `.`, `_` or `cache-`"
EMPTY = "files of rows that are empty"  # of a format that is never so, what is left of an upload that failed
NO_FILE = "pipes, devices and links to nothing"
LINK = "links to folders around or within the raw folder"
_IMAGES = tuple(f".{suffix}" for suffix in IMAGES)
_SUFFIX = re.compile(r"\.(?=\w*[a-z])\w{1,10}$", re.ASCII)  # of what is left out, if it is one
_KINDS = 50  # suffixes that are counted each


@dataclass
class Listing:
    """What a folder has. Names are relative to RAW. Memory grows with files of rows, not with images."""

    files: list[tuple[str, int]] = field(default_factory=list)  # of rows: (name, bytes)
    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)  # to folders, on a local disk
    total: int = 0  # the sum of a digest a file, which needs neither an order nor memory
    count: int = 0  # of all files
    others: Counter[str] = field(default_factory=Counter)  # left out: suffix -> files
    other_bytes: Counter[str] = field(default_factory=Counter)

    @property
    def digest(self) -> str:
        return f"{self.total % 2**128:032x}"

    def left_out(self) -> dict[str, str]:
        """Return the files that are neither rows nor images, by suffix, as people read it."""
        return {kind: f"{n:,} ({self.other_bytes[kind]:,} bytes)" for kind, n in sorted(self.others.items())}

    def add(self, name: str, entry: Entry) -> None:
        """Add a file: its name, size and time are what it is known by."""
        known_by = f"{name}\0{entry.size}\0{entry.modified}"
        self.total += xxhash.xxh3_128_intdigest(known_by.encode(errors="surrogateescape"))  # a name may be any bytes
        self.count += 1
        if holds_rows(name):
            self.files.append((name, entry.size))
            if not entry.size:
                self.leave_out(EMPTY, 1, 0)
        elif not name.lower().endswith(_IMAGES):
            suffix = _SUFFIX.search(name.lower())
            self.leave_out(suffix[0] if suffix else "no suffix", 1, entry.size)

    def leave_out(self, kind: str, files: int, size: int) -> None:
        kind = kind if kind in self.others or len(self.others) < _KINDS else "other suffixes"
        self.others[kind] += files
        self.other_bytes[kind] += size

    def merge(self, other: "Listing") -> None:
        self.files += other.files
        self.total += other.total
        self.count += other.count
        for kind, files in other.others.items():
            self.leave_out(kind, files, other.other_bytes[kind])


class RawFolder:
    """RAW of preprocess: a folder, or one file of rows. Raises UserError if it is not there."""

    def __init__(self, path: str):
        source = Folder(path)
        if not source.exists():
            raise UserError(f"the raw folder {path} does not exist: give a folder of {_known_suffixes()} files")
        self._path = path
        self._only = "" if source.is_folder() else source.name
        self.folder = source if source.is_folder() else source.parent

    @cached_property
    def listing(self) -> Listing:
        """All files but those of HIDDEN; files of rows are sorted. Raises UserError if there are no rows.

        A link to a folder is followed, unless that would list a folder twice.
        """
        whole, folders, links = Listing(), [""], Links(self.folder)
        while folders or links:
            folder = folders.pop() if folders else links.take()
            if folder is None:
                whole.leave_out(LINK, 1, 0)
                continue
            listing = call_with_retry(partial(self._list, folder))
            whole.merge(listing)
            folders += listing.folders
            for link in listing.links:
                links.add(link)
        if not any(size for _, size in whole.files):
            what = f"{len(whole.files)} files, all empty" if whole.files else f"none among {whole.count} files"
            raise UserError(f"{self._path} has no rows: it needs {_known_suffixes()} files and has {what}")
        whole.files.sort()
        return whole

    def _list(self, folder: str) -> Listing:
        listing = Listing()
        for entry in (self.folder / folder if folder else self.folder).entries():
            name = posixpath.join(folder, entry.name)
            if self._only:
                if entry.name != self._only:
                    continue
            elif entry.name.startswith(HIDDEN):
                if holds_rows(name) or (entry.is_folder and not entry.name.startswith(".")):
                    listing.leave_out(HIDDEN_NAMES, 1, 0 if entry.is_folder else entry.size)
                continue
            if entry.is_folder:
                listing.folders.append(name)
            elif entry.is_link and self.folder.is_folder(name):
                listing.links.append(name)
            elif not entry.is_file:
                listing.count += 1
                listing.leave_out(NO_FILE, 1, 0)
            else:
                listing.add(name, entry)
        return listing


def _known_suffixes() -> str:
    """The beginnings of lists of suffixes that a person need not read in full."""
    return " or ".join(suffix for suffix in SUFFIXES if suffix.count(".") == 1)
