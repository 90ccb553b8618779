"""Storage, copies and packed datasets on real HDFS daemons, whole and broken; and the cluster of the tests."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import xxhash

from jobs.cluster import Cluster
from jobs.daemons import DAEMONS, Settings
from kanyun.errors import UserError
from kanyun.naming import MANIFEST, dataset_name
from kanyun.reader import PackedDataset
from kanyun.schema import Sample
from kanyun.storage import Folder
from kanyun.transfer import copy_folder
from kanyun.verify import verify
from tests.support.packed_data import random_packs, write_packed

NAME = dataset_name(256, 0, 0)
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
    """stdout of Python code run as another HDFS user; `Folder` is there."""
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


# --- broken daemons


def test_datanode_killed_while_writing_and_reading(cluster: Cluster, hdfs: Folder) -> None:
    packs = random_packs(3, 40, 256)
    manifest = _write_packed(hdfs, packs)
    assert list(verify(hdfs / NAME)) == []
    dataset = PackedDataset(hdfs / NAME)
    with hdfs.create("written") as stream:
        stream.write(BYTES[: 3 << 20])  # of a block of 8 MiB
        cluster.kill("datanode-1")
        try:
            stream.write(BYTES[3 << 20 : 6 << 20])
            slowest = 0.0
            ids = []
            for number in range(len(dataset)):
                started = time.monotonic()
                ids += [pack.sample_ids.tolist() for pack in dataset.read_batch(number)]
                slowest = max(slowest, time.monotonic() - started)
            assert slowest < 5, "the other replica answers at once"
            copy_folder(hdfs / NAME, hdfs / "copied", "put")  # the NameNode still believes in the dead one
            hdfs.write("after", BYTES)
        finally:
            cluster.start("datanode-1")
    cluster.wait_for_hdfs()
    assert ids == [[s.sample_id for s in pack] for index in range(2) for pack in packs[index::2]]
    assert hdfs.read("written") == BYTES[: 6 << 20]
    assert hdfs.read("after") == BYTES
    for path in (NAME, "copied"):
        assert list(verify(hdfs / path)) == []
        assert PackedDataset(hdfs / path).manifest == manifest


def test_namenode_away_for_a_moment_only_delays(cluster: Cluster, hdfs: Folder) -> None:
    hdfs.write("file", BYTES)
    code = f"import time\nfor i in range(20): print(len(Folder({hdfs.uri!r}).read('file', i << 20))); time.sleep(0.2)"
    # In a separate process, so that daemons are started by this one's main thread: see Cluster.
    command = [sys.executable, "-c", f"from kanyun.storage import Folder\n{code}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert int(reader.stdout.readline()) == len(BYTES)
        cluster.stop("namenode")
        time.sleep(1)
        cluster.start("namenode")
        lengths = [int(line) for line in reader.stdout]
    assert reader.returncode == 0
    assert lengths == [len(BYTES) - (i << 20) for i in range(1, 20)]
    cluster.wait_for_hdfs()


def test_a_call_is_over_soon_when_there_is_no_namenode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting is for `call_with_retry`: six calls of three minutes, as hdfs-native has it, are 18 minutes."""
    monkeypatch.setattr("kanyun.storage.retries._PAUSES", (0.1,))
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        folder = Folder(f"hdfs://127.0.0.1:{taken.getsockname()[1]}/x")
        started = time.monotonic()
        with pytest.raises(UserError, match=r"cannot read .*Connection refused"):
            folder.read("file")
        assert time.monotonic() - started < 30, "two calls"


# --- put and fetch


def test_put_and_fetch_come_back_the_same(cluster: Cluster, hdfs: Folder, tmp_path: Path) -> None:
    local = tmp_path / "packs"
    _write_packed(Folder(str(local)), random_packs(4, 20, 256))
    (local / "note#1.txt").write_bytes(BYTES)
    _kanyun("put", str(local), hdfs.uri)
    assert list(verify(hdfs / NAME)) == []
    said = _kanyun("fetch", hdfs.uri, str(tmp_path / "back"))
    assert "every byte verified (0 were there already)" in said
    assert _tree(tmp_path / "back") == _tree(local)
    assert "(7 were there already)" in _kanyun("fetch", hdfs.uri, str(tmp_path / "back"))


def test_put_killed_in_the_middle_goes_on(hdfs: Folder, tmp_path: Path) -> None:
    local = tmp_path / "packs"
    _write_packed(Folder(str(local)), random_packs(5, 20, 256))
    for number in range(30):
        (local / NAME / f"extra-{number:02d}").write_bytes(BYTES[number:])
    command = [sys.executable, "-m", "kanyun", "put", str(local), hdfs.uri]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
        _until(lambda: sum(not name.startswith(".") for name in (hdfs / NAME).names()) >= 3)
        os.kill(running.pid, signal.SIGKILL)
    assert not hdfs.exists(f"{NAME}/{MANIFEST}"), "half a copy is no dataset"
    assert [name for name in (hdfs / NAME).names() if name.endswith(".copying")], "killed in the middle of files"
    done = copy_folder(Folder(str(local)), hdfs, "put")
    assert 0 < done.skipped < done.files == 36
    assert dict(hdfs.files()) == {n: len(data) for n, data in _tree(local).items()}
    assert list(verify(hdfs / NAME)) == []


def test_fetch_refuses_a_dataset_with_a_flipped_byte(hdfs: Folder, tmp_path: Path) -> None:
    _write_packed(hdfs, random_packs(6, 8, 256))
    shard = "shard-00000-of-00002.arrow"
    data = bytearray((hdfs / NAME).read(shard))
    data[900] ^= 1
    (hdfs / NAME).write(shard, bytes(data))
    with pytest.raises(UserError, match=rf"{shard} has digest .* its manifest says .* it is damaged"):
        copy_folder(hdfs, Folder(str(tmp_path / "back")), "fetch")
    assert not (tmp_path / "back" / NAME / MANIFEST).exists()


# --- the cluster itself


def test_taken_port_is_named_with_its_holder(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port {port} is taken by pid {os.getpid()} .*--spark-port N, or SPARK_PORT=N"
        ):
            Cluster(tmp_path, Settings(spark_port=port, hdfs_port=0, hdfs_web_port=0, spark_web_port=0)).up()
    assert list(tmp_path.iterdir()) == []


def test_running_cluster_is_found_by_its_folder(cluster: Cluster) -> None:
    found = Cluster(cluster.state)
    assert found.settings == cluster.settings
    assert {name: p.pid for name, p in found.running().items()} == {n: p.pid for n, p in cluster.running().items()}
    assert found.running().keys() == set(DAEMONS)
    assert "2 DataNodes" in found.status()["HDFS"]
    assert "2 workers" in found.status()["Spark"]
    with pytest.raises(UserError, match="take it down first"):
        Cluster(cluster.state, Settings()).up()


def test_down_spares_a_pid_that_is_now_another_program(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "cluster.json").write_text(json.dumps({"settings": {}, "pids": {"master": other.pid}}))
        Cluster(tmp_path).down()
        assert psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE
        assert json.loads((tmp_path / "cluster.json").read_text())["pids"] == {}
        other.kill()


def _write_packed(parent: Folder, packs: list[list[Sample]]) -> object:
    return write_packed(parent.uri, packs, 256)


def _kanyun(*args: str) -> str:
    done = subprocess.run([sys.executable, "-m", "kanyun", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _until(ready: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return True
