"""The reader of tar files, as WebDataset names their members."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.checks import RowError
from pipeline.datasets import dataset
from pipeline.readers import RawRow
from pipeline.stages.preprocess import found
from tests.support.raw_rows import COMPRESS, fields, rows_of, tar


def test_webdataset(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a cat"}]
    members = [
        ("./train/000.jpg", b"JPEG"),
        ("./train/000.txt", "eine Kätze".encode()),
        ("./train/000.cls", b"3"),
        ("./train/._000.jpg", b"of a Mac"),
        ("./train/001.left.png", b"LEFT"),
        ("./train/001.right.png", b"RIGHT"),
        ("./train/001.json", json.dumps({"messages": turns, "images": ["001.right.png", "b.jpg"]}).encode()),
        ("./train/002.json", b'{"image": "002.png", "conversations": []}'),
        ("./train/002.png", b"PNG"),
        ("./train/003.json", b"[1]"),
        ("./train/003.png", b"PNG"),
        ("./train/004.txt", b"\xff"),
        (f"./train/{'long' * 60}.txt", b"name"),
    ]
    (tmp_path / "a.tar").write_bytes(tar(members))
    first, second, third, bad, worse, long = rows_of(tmp_path / "a.tar", step=10)
    assert fields(first) == {"jpg": b"JPEG", "txt": "eine Kätze", "cls": b"3", "images": [b"JPEG"]}
    assert images_of("messages", second) == [b"RIGHT", "b.jpg"]
    assert images_of("llava", third) == [b"PNG"]
    assert isinstance(bad.fields, RowError)
    assert json.loads(bad.raw) == {"003.json": "[1]", "003.png": "<3 bytes>"}
    assert isinstance(worse.fields, RowError)
    assert "004.txt has invalid UTF-8 at byte 0" in worse.fields.evidence
    assert fields(long)["txt"] == "name"
    assert [row.position % 512 for row in (first, second, third, bad, worse, long)] == [0] * 6
    assert (first.position, second.position) == (0, 8 * 512)


def images_of(name: str, row: RawRow) -> list[str | bytes]:
    """The images of a row, with the bytes of the members that they name."""
    return [found(image, row) for image in dataset(name).sample(fields(row)).placed().images]


@pytest.mark.parametrize(
    ("row", "images"),
    [
        ({"image": "s/a.jpg"}, [b"JPEG"]),
        ({"images": ["a.mask.png", {"path": "./s/a.jpg", "bytes": None}]}, [b"MASK", b"JPEG"]),
        ({"images": None, "file": "a.jpg"}, [b"JPEG", b"MASK"]),
        ({"images": []}, []),
        ({"image": "b.jpg"}, ["b.jpg"]),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a.mask.png"}]}]}, [b"MASK"]),
        ({"messages": [{"role": "user", "content": "the file a.jpg"}]}, [b"JPEG", b"MASK"]),
    ],
)
def test_images_are_those_that_the_row_names_or_all_members(row: Any, images: list[Any], tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + json.dumps({"messages": []} | row).encode()  # with a byte order mark
    members = [("./s/a.jpg", b"JPEG"), ("./s/a.mask.png", b"MASK"), ("./s/a.json", data)]
    (tmp_path / "a.tar").write_bytes(tar(members))
    (only,) = rows_of(tmp_path / "a.tar")
    assert images_of("messages", only) == images


def test_a_damaged_tar_keeps_what_is_before(tmp_path: Path) -> None:
    data = bytearray(tar([(f"{n}.txt", b"text %d" % n) for n in range(5)], tarfile.USTAR_FORMAT))
    (tmp_path / "cut.tar").write_bytes(data[: 5 * 512 + 3])
    *rows, last = rows_of(tmp_path / "cut.tar")
    assert [fields(row)["txt"] for row in rows] == ["text 0"]
    assert isinstance(last.fields, RowError)
    assert last.raw == '{"1.txt": "text 1"}', "it may have had more members"
    data[6 * 512 + 20 : 6 * 512 + 200] = b"\x7f" * 180  # the fourth header
    (tmp_path / "header.tar").write_bytes(data)
    *rows, last = rows_of(tmp_path / "header.tar")
    assert [fields(row)["txt"] for row in rows] == ["text 0", "text 1", "text 2"]
    assert isinstance(last.fields, RowError)
    assert (last.position, "no tar from its byte 3072" in last.fields.evidence) == (3072, True)
    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 100)
    (row,) = rows_of(tmp_path / "none.tar")
    assert isinstance(row.fields, RowError)


def test_half_a_surrogate_is_written_as_its_escape(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x"}]
    data = b'{"caption": "cut \\ud83d", "messages": ' + json.dumps(turns).encode() + b"}"
    (tmp_path / "a.tar").write_bytes(tar([("a.json", data)]))
    (row,) = rows_of(tmp_path / "a.tar")
    assert fields(row)["messages"] == turns
    assert json.loads(row.raw)["caption"] == "cut \ud83d"
    row.raw.encode()


def test_member_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar([("\udcff.json", b"{damaged"), ("\udcff.jpg", b"JPEG")], tarfile.GNU_FORMAT))
    (row,) = rows_of(tmp_path / "a.tar")
    assert isinstance(row.fields, RowError)
    assert "no JSON" in row.fields.evidence
    row.raw.encode()
    row.fields.evidence.encode()


def test_equal_names_and_names_that_differ_in_case(tmp_path: Path) -> None:
    turns = json.dumps({"messages": []}).encode()
    (tmp_path / "a.tar").write_bytes(tar([("a.jpg", b"1"), ("a.jpg", b"2"), ("a.json", turns)]))
    (row,) = rows_of(tmp_path / "a.tar")
    assert isinstance(row.fields, RowError)
    assert row.fields.evidence == "the tar has 2 members named a.jpg"
    (tmp_path / "b.tar").write_bytes(tar([("b.jpg", b"1"), ("b.JPG", b"2"), ("b.JSON", turns), ("c.TXT", b"c")]))
    first, second = rows_of(tmp_path / "b.tar")
    assert fields(first) == {"jpg": b"1", "JPG": b"2", "images": [b"1", b"2"], "messages": []}
    assert fields(second) == {"txt": "c", "images": []}
    (tmp_path / "c.tar").write_bytes(tar([("c.json", turns), ("c.JSON", turns)]))
    (row,) = rows_of(tmp_path / "c.tar")
    assert isinstance(row.fields, RowError)
    assert "c.json and c.JSON" in row.fields.evidence


def test_one_name_in_two_spellings(tmp_path: Path) -> None:
    """`tar -r` appends x.json to a tar that was made of a folder, whose names begin with `./`."""
    turns = json.dumps({"messages": []}).encode()
    (tmp_path / "a.tar").write_bytes(tar([("./a.jpg", b"1"), ("a.json", turns), ("./b.jpg", b"2"), ("b.jpg", b"3")]))
    first, second = rows_of(tmp_path / "a.tar")
    assert fields(first) == {"jpg": b"1", "images": [b"1"], "messages": []}
    assert isinstance(second.fields, RowError)
    assert second.fields.evidence == "the tar has 2 members named b.jpg"


def test_members_that_are_a_suffix_alone_are_rows(tmp_path: Path) -> None:
    """Tools that name members by a key that is empty write them; what a Mac or an editor leaves is no row."""
    turns = json.dumps({"messages": []}).encode()
    members = [(".jpg", b"1"), (".json", turns), ("s/.JPG", b"2"), ("s/.left.png", b"3"), ("s/.json", turns)]
    left = [("._.json", b"mac"), ("s/._0.jpg", b"mac"), (".DS_Store", b"mac"), (".0.json.swp", b"vi")]
    (tmp_path / "a.tar").write_bytes(tar([*members, *left]))
    first, second = rows_of(tmp_path / "a.tar")
    assert fields(first) == {"jpg": b"1", "images": [b"1"], "messages": []}
    assert fields(second) == {"jpg": b"2", "left.png": b"3", "images": [b"2", b"3"], "messages": []}


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_tars_joined_by_cat_are_read_to_the_end(suffix: str, tmp_path: Path) -> None:
    """Joined before they were compressed, or afterwards, with the zeros between them that xz allows."""
    pack: Any = COMPRESS[suffix[1:]] if suffix else bytes
    first, second = (tar([(f"{n}.txt", f"{n}".encode())]) for n in (1, 2))
    name = f"a.tar{suffix}"
    padding = b"" if suffix == ".zst" else bytes(512)
    for joined in (pack(first + second), pack(first) + padding + pack(second)):
        (tmp_path / name).write_bytes(joined)
        places = [0, len(first) + (0 if suffix or joined != pack(first) + padding + pack(second) else len(padding))]
        rows = rows_of(tmp_path / name)
        assert [(row.position, fields(row)["txt"]) for row in rows] == list(zip(places, "12"))
    (tmp_path / name).write_bytes(pack(first + b"no tar" * 200))
    one, damage = rows_of(tmp_path / name)
    assert fields(one)["txt"] == "1"
    assert isinstance(damage.fields, RowError)
    assert damage.fields.evidence == f"{name} is no tar from its byte {len(first)} on"


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz"])
def test_links_have_the_bytes_of_their_members(name: str, tmp_path: Path) -> None:
    """Hard links, whose name is in full; symbolic ones, forward and back, over another link; and one to nowhere."""
    links = [
        ("s/1.jpg", tarfile.LNKTYPE, "s/0.jpg"),
        ("s/2.jpg", tarfile.SYMTYPE, "../t/9.jpg"),
        ("s/3.jpg", tarfile.SYMTYPE, "2.jpg"),
        ("s/4.jpg", tarfile.SYMTYPE, "4.jpg"),
    ]
    suffix = name.rpartition(".")[2]
    mode: Any = "w:" + {"gz": "gz", "tgz": "gz", "bz2": "bz2", "xz": "xz"}.get(suffix, "")  # a literal in the stubs
    with tarfile.open(tmp_path / name, mode) as archive:
        for member, kind, target in [("s/0.jpg", tarfile.REGTYPE, ""), *links, ("t/9.jpg", tarfile.REGTYPE, "")]:
            info = tarfile.TarInfo(member)
            info.type, info.linkname = kind, target
            data = f"bytes of {member}".encode() if kind == tarfile.REGTYPE else b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    *rows, loop, last = rows_of(tmp_path / name)
    zero, nine = b"bytes of s/0.jpg", b"bytes of t/9.jpg"
    assert [fields(row)["images"] for row in [*rows, last]] == [[zero], [zero], [nine], [nine], [nine]]
    assert isinstance(loop.fields, RowError)
    assert loop.fields.evidence == "s/4.jpg is a link that leads to no file in the tar"


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_what_is_behind_a_compressed_tar_is_told(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a.tar.{suffix}").write_bytes(COMPRESS[suffix](tar([("1.txt", b"1")])) + b"garbage")
    row, last = rows_of(tmp_path / f"a.tar.{suffix}")
    assert fields(row)["txt"] == "1"
    assert isinstance(last.fields, RowError)
    assert "cannot be decompressed from here on" in last.fields.evidence


def test_a_damaged_compressed_tar_keeps_what_is_before(tmp_path: Path) -> None:
    data = gzip.compress(tar([(f"{n}.txt", f"{n} {n**999}".encode()) for n in range(1, 40)]))
    (tmp_path / "a.tar.gz").write_bytes(data[: len(data) // 2])
    *rows, last = rows_of(tmp_path / "a.tar.gz")
    assert [fields(row)["txt"].split()[0] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
    assert len(rows) > 5
    assert isinstance(last.fields, RowError)
    assert "is damaged after its byte" in last.fields.evidence
