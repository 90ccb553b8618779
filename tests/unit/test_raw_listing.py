"""What preprocess finds in a raw folder, and by what it knows the folder again."""

import os
import tracemalloc
from pathlib import Path

import pytest

from kanyun.errors import UserError
from kanyun.storage import Folder
from pipeline.readers.raw_folder import EMPTY, HIDDEN_NAMES, LINK, NO_FILE, RawFolder


def listed(raw: Path) -> tuple[list[tuple[str, int]], str]:
    listing = RawFolder(str(raw)).listing
    return listing.files, listing.digest


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    for name in ("b.jsonl", "deep/er/a.jsonl.gz", "deep/images/1.png", "deep/images/2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"some bytes")
    return folder


def test_digest_tells_every_change_and_nothing_else(raw: Path) -> None:
    files, before = listed(raw)
    assert files == [("b.jsonl", 10), ("deep/er/a.jsonl.gz", 10)]
    image, times = raw / "deep/images/1.png", (raw / "b.jsonl").stat()
    seen = {before}

    def changed() -> bool:
        seen.add(digest := listed(raw)[1])
        return digest != before

    for hidden in ("_logs/x.jsonl", "deep/.x.png", "deep/cache-1.arrow"):
        (raw / hidden).parent.mkdir(exist_ok=True)
        (raw / hidden).write_bytes(b"no data")
    assert not changed()
    image.rename(raw / "deep/images/3.png")
    assert changed()
    (raw / "deep/images/3.png").rename(raw / "deep/1.png")
    assert changed()
    (raw / "deep/1.png").rename(image)
    assert not changed()
    os.utime(raw / "b.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert changed()
    (raw / "b.jsonl").write_bytes(b"some bytes more")
    os.utime(raw / "b.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed()
    (raw / "b.jsonl").write_bytes(b"some bytes")
    os.utime(raw / "b.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not changed()
    image.unlink()
    assert changed()
    assert len(seen) == 6, "each its own"


def test_a_file_alone_is_known_by_itself(raw: Path) -> None:
    before = listed(raw / "b.jsonl")
    assert before[0] == [("b.jsonl", 10)]
    (raw / "deep/images/1.png").write_bytes(b"other")
    (raw / "c.jsonl").write_bytes(b"other")
    assert listed(raw / "b.jsonl") == before
    (raw / "_b.jsonl").write_bytes(b"named by the user: not hidden")
    assert listed(raw / "_b.jsonl")[0] == [("_b.jsonl", 29)]


def test_names_that_are_no_text(raw: Path) -> None:
    before = listed(raw)[1]
    Path(os.fsdecode(bytes(raw / "deep/images") + b"/\xff.png")).touch()
    assert listed(raw)[1] != before


def test_links_to_nowhere_or_themselves_and_folders_without_rows(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/image.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "raw/loop.png").symlink_to("loop.png")
    with pytest.raises(UserError, match="none among 2 files"):
        listed(tmp_path / "raw")


def test_what_is_no_file_is_left_out(raw: Path) -> None:
    """A pipe would block for ever, and a link to nothing fail the task that reads it."""
    before = [name for name, _ in RawFolder(str(raw)).listing.files]
    os.mkfifo(raw / "pipe.jsonl")
    (raw / "gone.parquet").symlink_to("nowhere.parquet")
    listing = RawFolder(str(raw)).listing
    assert [name for name, _ in listing.files] == before
    assert listing.left_out()[NO_FILE] == "2 (0 bytes)"


def test_what_is_left_out_is_counted_by_suffix(raw: Path) -> None:
    """Images are what rows name, and hidden names are no data; where they look like data, they are counted."""
    names = [
        "notes.txt",
        "deep/more.TXT",
        "LICENSE",
        "v1.0",
        "x.zip",
        "state.json",
        "e.parquet.crc",
        ".hidden",
        "_SUCCESS",
        "_train.jsonl",
        "deep/cache-1.arrow",
    ]
    for name in names:
        (raw / name).write_bytes(b"bytes")
    (raw / "_more").mkdir()
    (raw / ".git").mkdir()
    (raw / "f.parquet").touch()
    (raw / "g.jsonl.gz").touch()
    assert RawFolder(str(raw)).listing.left_out() == {
        HIDDEN_NAMES: "3 (10 bytes)",
        EMPTY: "2 (0 bytes)",
        ".crc": "1 (5 bytes)",
        ".json": "1 (5 bytes)",
        ".txt": "2 (10 bytes)",
        ".zip": "1 (5 bytes)",
        "no suffix": "2 (10 bytes)",
    }
    for number in range(200):
        (raw / f"a.k{number}").touch()
    assert len(RawFolder(str(raw)).listing.left_out()) <= 51


@pytest.mark.parametrize("backwards", [False, True])
def test_linked_folders_are_followed_once(backwards: bool, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ones in any order of listing, and a folder rather than one within it."""
    listed = Folder.entries
    monkeypatch.setattr(Folder, "entries", lambda folder: sorted(listed(folder), key=str, reverse=backwards))
    elsewhere = raw.parent / "elsewhere"
    (elsewhere / "sub").mkdir(parents=True)
    (elsewhere / "h.jsonl").write_bytes(b"{}")
    (elsewhere / "sub" / "i.json").write_bytes(b"{}")
    for name, target in {
        "linked": elsewhere,
        "again": elsewhere / "sub",
        "deep/up": raw,
        "around": raw.parent,
        "within": raw / "deep",
    }.items():
        (raw / name).symlink_to(target)
    (raw / "file.jsonl").symlink_to(elsewhere / "h.jsonl")
    listing = RawFolder(str(raw)).listing
    names = [name for name, _ in listing.files]
    assert names == ["b.jsonl", "deep/er/a.jsonl.gz", "file.jsonl", "linked/h.jsonl", "linked/sub/i.json"]
    assert listing.others[LINK] == 4


def test_images_take_no_memory_of_the_driver(raw: Path) -> None:
    """An image a sample: 0.8 kB each, of a listing held in memory, were 15 MB here and 59 GB of 77 M samples."""
    for number in range(20_000):
        (raw / f"deep/images/{number}.png").touch()
    listed(raw)
    tracemalloc.start()
    try:
        listed(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
