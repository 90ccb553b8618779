"""A disk that has no room, is read-only, or fails under a save: one sentence, and the checkpoint before stays whole."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kanyun.errors import UserError
from kanyun.storage import Folder
from kanyun.storage.local import LocalBackend
from tests.support.checkpoints import names, write_step
from trainer.checkpoint.faults import faults
from trainer.checkpoint.store import attempt_folder, set_aside, step_name
from trainer.checkpoint.together import room_of


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "out"))


def test_checkpoints_may_link_to_a_larger_disk(output: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    larger = tmp_path / "larger"
    larger.mkdir()
    output.make()
    Path(output.path, "checkpoints").symlink_to(larger)
    disk_usage = shutil.disk_usage

    def usage(path: str) -> Any:
        inside = Path(path).resolve().is_relative_to(larger)
        return disk_usage(path)._replace(free=10**9 if inside else 1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert write_step(output, 1).exists()


def test_room_for_checkpoints_is_what_is_free_and_what_later_ones_replace(
    output: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, disk_usage = write_step(output, 1), shutil.disk_usage
    write_step(output, 3, keep_last=2)
    set_aside(output, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk_usage(path)._replace(free=5000))
    assert room_of(output) == 5000 + sum(size for _, size in step.files())


@pytest.mark.parametrize("name", [".metadata", "state.json", "latest"])
def test_a_disk_that_gets_full_in_a_small_file(name: str, output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last files of a checkpoint, one sentence says what is free and needed; the hint is not worth one."""
    create, disk_usage = LocalBackend.create, shutil.disk_usage

    def full(backend: LocalBackend, path: str) -> Any:
        if path.endswith(f".{name}.tmp"):
            monkeypatch.setattr(shutil, "disk_usage", lambda path: disk_usage(path)._replace(free=5000))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return create(backend, path)

    monkeypatch.setattr(LocalBackend, "create", full)
    if name == "latest":
        assert write_step(output, 1).exists()
        return
    with pytest.raises(UserError, match=r"/out/checkpoints has 0\.0 MB free, \d\.\d MB are needed: make room there"):
        write_step(output, 1)
    assert names(output) == []


def test_a_quota_or_inodes_that_are_used_up(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the disk has room, and making more would help nobody."""

    def full(backend: LocalBackend, path: str) -> Any:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), path)

    monkeypatch.setattr(LocalBackend, "create", full)
    sentence = r"free, \d\.\d MB are needed \(Disk quota exceeded\): see to your quota, and to inodes \(df -i\)"
    with pytest.raises(UserError, match=sentence):
        write_step(output, 1)


@pytest.mark.parametrize("call", ["mkdir", "open", "pwrite", "ftruncate", "fsync", "replace", "rename"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_that_refuses(call: str, number: int, output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each system call of a save fails with each error of a disk that goes away."""
    before = write_step(output, 1)

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        name = path if isinstance(path, str) else f"fd {path}"
        raise OSError(number, os.strerror(number), name)

    with monkeypatch.context() as disk:
        disk.setattr(os, call, refuse)
        with pytest.raises(UserError) as refused:
            write_step(output, 2)
    assert os.strerror(number) in str(refused.value)
    assert f"{output.path}/checkpoints" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert faults(before) == []
    write_step(output, 3)
    assert names(output) == ["latest", "step_00000003"]


def test_all_of_it_is_flushed_before_it_has_its_name_and_that_before_the_hint_moves(
    output: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []

    def note(call: str, path: Callable[..., str]) -> None:
        real = getattr(os, call)

        def noting(*arguments: Any) -> Any:
            calls.append((call, path(*arguments)))
            return real(*arguments)

        monkeypatch.setattr(os, call, noting)

    output.make()
    output.write("metrics.jsonl", b"{}\n")
    note("fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    note("rename", lambda source, target: target)
    note("replace", lambda source, target: target)
    step = write_step(output, 1)
    root, attempt = f"{output.path}/checkpoints", f"{output.path}/checkpoints/.attempt-step_00000001"
    named, hinted = calls.index(("rename", step.path)), calls.index(("replace", f"{root}/latest"))
    flushed = {path for call, path in calls[:named] if call == "fsync"}
    assert {attempt, *(f"{attempt}/{name}" for name, _ in step.files())} <= flushed
    assert ("fsync", root) in calls[named:hinted]
    # So that after a power cut it has the lines up to the checkpoint's step.
    assert calls.index(("fsync", f"{output.path}/metrics.jsonl")) < calls.index(("replace", f"{attempt}/state.json"))


def test_a_disk_that_is_away_is_not_written_below_its_mount_point(output: Folder) -> None:
    output.make()
    with pytest.raises(UserError, match="/out has lost this run's claim: mount its disk again if that is away; if"):
        write_step(output, 1, owns=lambda: False)
    assert output.names() == []


def test_what_the_run_that_took_this_one_s_place_is_writing_stays(output: Folder) -> None:
    attempt_folder(output, step_name(1)).make()
    attempt_folder(output, step_name(1)).write("its tensors", b"half")
    with pytest.raises(UserError, match="/out has lost this run's claim"):
        write_step(output, 1, owns=lambda: False)
    assert attempt_folder(output, step_name(1)).read("its tensors") == b"half"
