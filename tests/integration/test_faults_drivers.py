"""Two drivers on one output, and drivers that died: on local disk and on HDFS."""

import json
import threading
import time
from pathlib import Path

import pytest

from jobs.cluster import Cluster
from kanyun.errors import UserError
from kanyun.storage import Folder, claim
from pipeline.stages.attempt import DRIVER, STARTING, Attempt


@pytest.fixture(params=["file", "hdfs"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """An empty place on each storage; a driver is dead after 4 s."""
    monkeypatch.setattr(claim, "HEARTBEAT", 0.5)
    monkeypatch.setattr(claim, "DEAD_AFTER", 4)
    if request.param == "file":
        return Folder(str(tmp_path / "root"))
    return Folder(f"{request.getfixturevalue('cluster').hdfs}/{tmp_path.name}")


def make(root: Folder, content: bytes) -> None:
    with Attempt.begin(root / "out", {}) as mine:
        mine.folder.write("file", content)
        mine.publish()


def dead_attempt(root: Folder) -> Folder:
    """Write what kill -9 leaves of an attempt."""
    folder = root / f"_attempt-out-{'0' * 32}"
    folder.write("half", b"half")
    folder.write(DRIVER, json.dumps({"host": "far", "pid": 7, "since": "2026-01-01 10:00:00"}).encode())
    return folder


def test_second_driver_is_refused_and_harms_nothing(root: Folder) -> None:
    with Attempt.begin(root / "out", {}) as first:
        first.folder.write("file", b"first")
        with pytest.raises(UserError, match=r"out is being written by process \d+ on .*, since 20.*: wait for"):
            make(root, b"second")
        assert root.names() == [first.folder.name]
        first.publish()
    assert root.files() == [("out/file", 5)]
    make(root, b"third, which replaces")
    assert root.files() == [("out/file", 21)]


def test_attempts_of_dead_drivers_and_of_other_outputs(root: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    dead_attempt(root)
    (root / f"_attempt-out-{'1' * 32}").write("no claim", b"")
    (root / f"{STARTING}_attempt-out-{'3' * 32}").write(DRIVER, b"")
    (root / f"_attempt-out-2-{'2' * 32}").write("another output's", b"")
    started = time.monotonic()
    make(root, b"mine")
    assert 4 <= time.monotonic() - started < 15
    assert root.files() == [(f"_attempt-out-2-{'2' * 32}/another output's", 0), ("out/file", 4)]
    assert "watching for 4 s whether these still work: process 7 on far, since 2026-01-01 10:00:00" in (
        capfd.readouterr().err
    )


def test_driver_that_was_taken_for_dead_does_not_publish(root: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as asleep:
        asleep.setattr(claim, "HEARTBEAT", 3600)
        with (
            pytest.raises(UserError, match=r"another run took this one for dead after 4 s without a heartbeat"),
            Attempt.begin(root / "out", {}) as sleeper,
        ):
            sleeper.folder.write("file", b"too late")
            make(root, b"in time")
            sleeper.folder.write("of a task that still ran", b"")
            sleeper.publish()
    assert root.files() == [("out/file", 7)]


def test_of_drivers_that_start_together_at_most_one_goes_on(root: Folder) -> None:
    began: list[str] = []
    refused: list[Exception] = []
    together = threading.Barrier(4)
    deadline = time.monotonic() + 60

    def drive() -> None:
        together.wait()
        try:
            with Attempt.begin(root / "out", {}) as mine:
                began.append(mine.folder.name)
                while len(began) + len(refused) < 4:  # at work for as long as another one looks
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
        except Exception as error:
            refused.append(error)

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(began) <= 1
    assert len(began) + len(refused) == 4
    assert all(isinstance(error, UserError) for error in refused), refused
    assert root.names() == []


def test_what_storage_refuses_a_claim_is_one_sentence(cluster: Cluster, tmp_path: Path) -> None:
    place = Folder(f"{cluster.hdfs}/{tmp_path.name}")
    place.make()
    cluster.dfsadmin("-safemode", "enter")
    try:
        with pytest.raises(UserError, match=r"cannot write below .*in safe mode"), Attempt.begin(place / "out", {}):
            pass
    finally:
        cluster.dfsadmin("-safemode", "leave")
    assert place.names() == []
