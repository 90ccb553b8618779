"""Folder on a local disk and on real HDFS daemons: the same methods, the same errors."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash

from jobs.cluster import Cluster
from kanyun.errors import UserError
from kanyun.storage import Folder

BYTES = np.random.default_rng(0).bytes((20 << 20) + 7)  # three HDFS blocks


@pytest.fixture(params=["file", "hdfs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty place on each storage."""
    if request.param == "file":
        return Folder(str(tmp_path / "root"))
    return Folder(f"{request.getfixturevalue('cluster').hdfs}/{tmp_path.name}")


@pytest.fixture
def hdfs(cluster: Cluster, tmp_path: Path) -> Folder:
    return Folder(f"{cluster.hdfs}/{tmp_path.name}")


def as_user(name: str, cluster: Cluster, code: str) -> str:
    """Return the stdout of Python code run as another HDFS user; `Folder` is there."""
    command = [sys.executable, "-c", f"from kanyun.storage import Folder\n{code}"]
    env = os.environ | cluster.env | {"HADOOP_USER_NAME": name}
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


# --- Folder: the same on both storages


def test_folder_reads_what_it_wrote(root: Folder) -> None:
    assert not root.exists()
    assert (root.names(), root.files()) == ([], [])
    root.write("a/b c#1?%41é.bin", b"0123456789")
    root.write("a/b c#2?%41é.bin", b"")
    assert root.exists("a")
    assert (root.names(), (root / "a").names()) == (["a"], ["b c#1?%41é.bin", "b c#2?%41é.bin"])
    assert root.files() == [("a/b c#1?%41é.bin", 10), ("a/b c#2?%41é.bin", 0)]
    name = "a/b c#1?%41é.bin"
    assert root.size(name) == 10
    assert Folder(f"{root.uri}/a").read("b c#1?%41é.bin") == b"0123456789", "by its own URI"
    ranges = [(0, 3), (4, 3), (8, 9), (10, 1), (11, 1), (3, 0), (7, None)]
    assert [root.read(name, *r) for r in ranges] == [b"012", b"456", b"89", b"", b"", b"", b"789"]
    assert root.digest(name) == xxhash.xxh3_128_hexdigest(b"0123456789")
    root.write(name, b"new")
    assert root.read(name) == b"new"
    assert root.uri.startswith(("file:///", "hdfs://127.0.0.1:"))
    assert root.parent.names().count(root.name) == 1


def test_folder_streams_large_files(root: Folder) -> None:
    with root.create("deep/er/large") as stream:
        for start in range(0, len(BYTES), 3 << 20):
            stream.write(BYTES[start : start + (3 << 20)])
    assert root.files() == [("deep/er/large", len(BYTES))]
    assert root.digest("deep/er/large") == xxhash.xxh3_128_hexdigest(BYTES)
    assert b"".join(root.pieces("deep/er/large", 5 << 20)) == BYTES
    edge = 8 << 20
    assert root.read("deep/er/large", edge - 5, 10) == BYTES[edge - 5 : edge + 5], "over the edge of a block"


def test_folder_reads_ranges_of_a_file_that_it_opens_once(root: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    root.write("large", BYTES)
    opened, step = root.ranges("large"), 300_001
    starts = range(0, len(BYTES), step)
    assert opened.read(0, 1) == BYTES[:1]
    monkeypatch.setattr(opened, "_open_file", lambda: pytest.fail("opened again"))
    with ThreadPoolExecutor(8) as threads:
        assert b"".join(threads.map(lambda start: opened.read(start, step), starts)) == BYTES
    assert [opened.read(len(BYTES) + beyond, 5) for beyond in (-3, 0, 9)] == [BYTES[-3:], b"", b""]
    root.delete("large")
    with pytest.raises(FileNotFoundError, match="large does not exist"):
        root.ranges("large").read(0, 1)


def test_folder_moves_and_deletes(root: Folder) -> None:
    (root / "old").write("x", b"x")
    (root / "old").write("y", b"y")
    (root / "old").move_file("x", root / "else" / "where", "z")
    assert root.files() == [("else/where/z", 1), ("old/y", 1)]
    (root / "old").move_file("y", root / "else" / "where", "z")
    assert (root / "else").read("where/z") == b"y", "replaced"
    (root / "else").move_to(root / "new" / "home")
    assert root.files() == [("new/home/where/z", 1)]
    (root / "other").make()
    with pytest.raises(UserError, match=r"cannot write below .*exists"):
        (root / "new").move_to(root / "other")
    assert root.names() == ["new", "old", "other"]
    root.delete("new/home/where/z")
    root.delete("never there")
    assert root.files() == []
    root.delete()
    assert not root.exists()


def test_missing_files_are_file_not_found(root: Folder) -> None:
    for read in (root.read, root.size, root.digest):
        with pytest.raises(FileNotFoundError, match="nothing does not exist"):
            read("nothing")
    with pytest.raises(FileNotFoundError):
        (root / "nothing").move_to(root / "new")


def test_folders_that_may_not_be_listed_are_no_empty_folders(cluster: Cluster, hdfs: Folder) -> None:
    """Raw data would be missing from the packs, and nobody would know."""
    hdfs.write("open/file", b"")
    hdfs.write("shut/file", b"")
    cluster.shell("-chmod", "700", f"{hdfs.path}/shut")
    code = f"try: print(Folder({hdfs.uri!r}).files())\nexcept Exception as e: print(type(e).__name__, e)"
    assert "AccessDeniedError cannot read" in as_user("somebody", cluster, code)
    assert len(hdfs.files()) == 2


def test_a_process_that_used_hdfs_may_fork(hdfs: Folder) -> None:
    """As Spark's launcher does, by preexec_fn; the child must not close the client."""
    hdfs.write("file", b"x")
    done = subprocess.run(["true"], preexec_fn=lambda: None, timeout=20)
    assert done.returncode == 0
    assert hdfs.read("file") == b"x"


# --- HDFS says no: one sentence


def test_permission_denied_is_one_sentence(cluster: Cluster, hdfs: Folder) -> None:
    hdfs.write("file", b"x")
    cluster.shell("-chmod", "700", hdfs.path)
    for call in ("read('file')", "write('new', b'x')", "exists('file')", "names()", "delete('file')"):
        code = f"try: Folder({hdfs.uri!r}).{call}\nexcept Exception as e: print(type(e).__name__, e)"
        said = as_user("somebody", cluster, code)
        assert said.startswith("AccessDeniedError cannot "), said
        assert "Permission denied: user=somebody" in said
        assert "\tat " not in said
        assert said.count("\n") == 1
    assert hdfs.read("file") == b"x"


def test_space_quota_and_safe_mode_are_one_sentence(cluster: Cluster, hdfs: Folder) -> None:
    hdfs.make()
    cluster.dfsadmin("-setSpaceQuota", "40m", hdfs.path)  # two replicas
    with pytest.raises(UserError, match=r"cannot write .*The DiskSpace quota of .* is exceeded"):
        hdfs.write("large", BYTES)
    assert not hdfs.exists("large")
    cluster.dfsadmin("-clrSpaceQuota", hdfs.path)
    hdfs.write("large", BYTES)
    cluster.dfsadmin("-safemode", "enter")
    try:
        with pytest.raises(UserError, match=r"cannot write .*in safe mode\.\): choose"):
            hdfs.write("another", b"x")
        assert hdfs.digest("large") == xxhash.xxh3_128_hexdigest(BYTES), "reading goes on"
    finally:
        cluster.dfsadmin("-safemode", "leave")


def test_wrong_uris_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HADOOP_CONF_DIR", raising=False)
    for uri in ("hdfs:///no/host", "hdfs://nameservice-without-conf/x", "hdfs://host:port/x", "s3x://bucket/x"):
        with pytest.raises(UserError, match=f"cannot use {uri} .*hdfs://HOST:PORT/PATH"):
            Folder(uri)
