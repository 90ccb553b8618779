"""Claims: one writer an output, and dead ones are told from living ones by their heartbeat."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kanyun.errors import UserError
from kanyun.storage import Folder, claim


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "HEARTBEAT", 0.2)
    monkeypatch.setattr(claim, "DEAD_AFTER", 2)


def test_second_writer_of_a_folder_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "out"))
    with claim.only_writer(folder) as first:
        with (
            pytest.raises(UserError, match=r"out is being written by process \d+ on .*, since 20.*: wait for"),
            claim.only_writer(folder),
        ):
            pass
        assert folder.names() == [first.name]
        assert first.is_there()
    assert folder.names() == []


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_jumps_neither_frees_nor_keeps_a_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    folder, clock = Folder(str(tmp_path / "out")), time.time_ns
    with claim.only_writer(folder):
        monkeypatch.setattr(time, "time_ns", lambda: clock() + hours * 3600 * 10**9)
        with pytest.raises(UserError, match="is being written by process"), claim.only_writer(folder):
            pass
    folder.write("_writer-0.json", json.dumps({"host": "far", "pid": 7, "since": "2026-01-01 10:00:00"}).encode())
    with claim.only_writer(folder) as mine:  # its process is dead, so its heartbeat does not count
        assert folder.names() == [mine.name]


def test_claims_of_dead_processes_are_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(str(tmp_path))
    folder.write("_writer-0.json", json.dumps({"host": "far", "pid": 7, "since": "2026-01-01 10:00:00"}).encode())
    with claim.only_writer(folder) as mine:
        assert folder.names() == [mine.name]
    assert "these still work: process 7 on far, since 2026-01-01 10:00:00" in capsys.readouterr().err


def test_a_process_that_died_on_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    """A run that is started again after a kill goes on at once."""
    code = (
        "import os, sys; from kanyun.storage.claim import only_writer; from kanyun.storage import Folder\n"
        "with only_writer(Folder(sys.argv[1])): os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (left,) = Folder(str(tmp_path)).names()
    assert claim.Claim(Folder(str(tmp_path)), left).is_surely_dead()
    with claim.only_writer(Folder(str(tmp_path))) as ours:
        assert Folder(str(tmp_path)).names() == [ours.name]
        assert not ours.is_surely_dead()
