"""Reading, writing and copies while daemons of HDFS die, and the cluster of the tests itself."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

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


@pytest.fixture
def hdfs(cluster: Cluster, tmp_path: Path) -> Folder:
    return Folder(f"{cluster.hdfs}/{tmp_path.name}")


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
        (local / NAME / f"extra-{number:02d}").write_bytes(BYTES[number : number + (6 << 20)])
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
