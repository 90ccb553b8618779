"""Folder on local disk: one spelling of a path, links, and what is no path."""

import os
from pathlib import Path

import pytest

from kanyun.errors import AccessDeniedError, InvalidPathError, UserError
from kanyun.storage import Folder


@pytest.mark.parametrize(
    "spelling", ["../x/raw", "../x/raw/.", "../x//raw", "../x/raw/a/..", "raw/", "./raw", "../x/./raw"]
)
def test_a_folder_is_the_same_however_it_is_spelt(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x/raw/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "x")
    assert Folder(spelling).path == str(tmp_path / "x/raw")
    assert Folder(f"{tmp_path}/x/{spelling}").uri == f"file://{tmp_path}/x/raw"
    assert Folder(f"file://{tmp_path}/x/{spelling}").path == str(tmp_path / "x/raw")


def test_two_dots_after_a_link_lead_where_the_system_goes(tmp_path: Path) -> None:
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/deep")
    (tmp_path / "far/file").write_bytes(b"x")
    assert os.path.exists(f"{tmp_path}/link/../file")
    assert Folder(f"{tmp_path}/link/..").path == str(tmp_path / "far")
    assert Folder(f"{tmp_path}/link").path == str(tmp_path / "link"), "a link keeps its name"
    assert Folder(f"{tmp_path}/link").resolved().path == str(tmp_path / "far/deep")
    assert Folder(f"{tmp_path}/far").contains(Folder(f"{tmp_path}/link"))
    assert not Folder(f"{tmp_path}/far/dee").contains(Folder(f"{tmp_path}/link"))


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("HDFS://h:8020/raw", r"give hdfs://h:8020/raw, or \./HDFS"),
        ("", "a path is empty: give a local path"),
        ("hdfs:/raw", "give hdfs://HOST:PORT/raw, or"),
        ("hdfs:raw", "give hdfs://HOST:PORT/raw, or"),
        ("hdfs://h:port/raw", "give hdfs://HOST:PORT/"),
        ("FILE:///raw", "give file:///raw, or"),
        ("file://raw/x", "a host or a relative path"),
        ("file:raw", "a host or a relative path"),
        (" hdfs://h:8020/raw", r"cannot use ' hdfs://h:8020/raw' \(spaces around it\): give hdfs://h:8020/raw"),
        ("s3://bucket/raw", "s3: URIs are not supported.: give a local path or hdfs://HOST:PORT/PATH"),
        ("gs:/bucket", "gs: URIs are not supported"),
        ("memory://x", "memory: URIs are not supported"),
    ],
)
def test_uris_that_are_none_of_ours_are_one_sentence(
    uri: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hdfs:/raw").mkdir(parents=True)
    with pytest.raises(UserError, match=sentence):
        Folder(uri)
    assert Folder("./hdfs:/raw").is_folder()


def test_hdfs_paths_are_normalised_without_asking_a_server() -> None:
    assert Folder("hdfs://h:1/x//raw/./a/..").uri == "hdfs://h:1/x/raw"
    assert Folder("hdfs://h:1//raw/../..").uri == "hdfs://h:1/"
    assert Folder("hdfs://Host:1/a#b?c%20 d").path == "/a#b?c%20 d"


def test_files_follow_links_and_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far/a").write_bytes(b"123")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/linked").symlink_to("../far")
    (tmp_path / "in/b").symlink_to("../far/a")
    folder = Folder(str(tmp_path / "in"))
    assert folder.files() == [("b", 3), ("linked/a", 3)]
    assert [(e.name, e.is_folder, e.is_link) for e in sorted(folder.entries(), key=lambda e: e.name)] == [
        ("b", False, True), ("linked", False, True)
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"cannot read .*far/a \(.*Not a directory"):
        Folder(str(tmp_path / "far/a")).names()
    assert not folder.exists("b/c")
    folder.delete("linked")
    assert (tmp_path / "far/a").exists(), "the link is deleted, not what it leads to"


def test_kinds_of_errors(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        folder.read("none")
    for name in ("a\0b", "a" * 300):
        with pytest.raises(InvalidPathError, match="cannot read"):
            folder.stat(name)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InvalidPathError, match="Too many levels"):
        folder.read("loop")
    if os.getuid():
        (tmp_path / "shut").touch(mode=0)
        with pytest.raises(AccessDeniedError, match="Permission denied"):
            folder.read("shut")
