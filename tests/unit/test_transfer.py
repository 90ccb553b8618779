"""put and fetch on local disk: nothing lost, nothing damaged, nothing done twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kanyun.errors import UserError
from kanyun.naming import MANIFEST, dataset_name
from kanyun.storage import Folder
from kanyun.transfer import Copied, copy_folder
from kanyun.verify import verify
from tests.support.packed_data import random_packs, write_packed

NAME = dataset_name(256, 0, 0)


@pytest.fixture
def packs(tmp_path: Path) -> Path:
    write_packed(tmp_path / "packs", random_packs(0, 12, 256), 256)
    return tmp_path / "packs"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy(source: Path, target: Path) -> Copied:
    return copy_folder(Folder(str(source)), Folder(str(target)), "copy")


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_copy_is_the_same_files_and_a_sound_dataset(packs: Path, tmp_path: Path) -> None:
    (packs / NAME / "tokenizer").mkdir()
    (packs / NAME / "tokenizer" / "empty.json").write_bytes(b"")
    done = copy(packs, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(packs)
    assert (done.files, done.skipped) == (7, 0), "2 shards, 2 lineages, batches, manifest, tokenizer"
    assert done.bytes == sum(map(len, tree(packs).values()))
    assert list(verify(Folder(str(tmp_path / "copy" / NAME)))) == []


def test_files_with_odd_names_and_sizes_are_copied(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, size in {"a b#1?.jpg": 10, "a b#2?.jpg": 0, "é/%41": (8 << 20) + 1, ".hidden": 3}.items():
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(size))
    copy(tmp_path / "raw", tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(tmp_path / "raw")


def test_second_copy_does_only_what_is_missing_or_wrong(packs: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    copy(packs, target)
    shards = sorted((target / NAME).glob("shard-*"))
    before = shards[0].stat().st_mtime_ns
    flip(shards[1], 5000)
    (target / NAME / MANIFEST).unlink()
    assert copy(packs, target).skipped == 4, "of 6: not the flipped shard, not the manifest"
    assert tree(target) == tree(packs)
    assert shards[0].stat().st_mtime_ns == before


@pytest.mark.parametrize("file", ["shard-00001-of-00002.arrow", "lineage/lineage-00000-of-00002.parquet"])
def test_flipped_byte_at_the_source_is_refused_and_leaves_no_dataset(packs: Path, tmp_path: Path, file: str) -> None:
    flip(packs / NAME / file, 700)
    with pytest.raises(UserError, match=rf"{file} has digest \w+, its manifest says \w+: it is damaged"):
        copy(packs, tmp_path / "copy")
    there = tree(tmp_path / "copy")
    assert f"{NAME}/{file}" not in there
    assert f"{NAME}/{MANIFEST}" not in there


def test_dataset_with_a_missing_shard_is_refused_before_a_byte_is_copied(packs: Path, tmp_path: Path) -> None:
    (packs / NAME / "shard-00000-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"shard-00000-of-00002\.arrow is missing"):
        copy(packs, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_another_dataset_in_the_way_is_refused(packs: Path, tmp_path: Path) -> None:
    write_packed(tmp_path / "copy", random_packs(1, 3, 256), 256)
    before = tree(tmp_path / "copy")
    with pytest.raises(UserError, match="belongs to another dataset than"):
        copy(packs, tmp_path / "copy")
    assert tree(tmp_path / "copy") == before


def test_nothing_to_copy_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no files"):
        copy(tmp_path / "nothing", tmp_path / "copy")


def test_killed_copy_goes_on_where_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "big").mkdir()
    for number in range(60):
        (tmp_path / "big" / f"{number:02d}").write_bytes(rng.bytes(6 << 20))
    command = [sys.executable, "-m", "kanyun", "put", str(tmp_path / "big"), str(tmp_path / "copy")]
    with subprocess.Popen(command) as running:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "copy").glob("??")) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(running.pid, signal.SIGKILL)
    finished = {name: path.stat().st_mtime_ns for path in (tmp_path / "copy").glob("??") if (name := path.name)}
    assert 0 < len(finished) < 60, "killed in the middle"
    done = copy(tmp_path / "big", tmp_path / "copy")
    assert done.skipped == len(finished)
    assert tree(tmp_path / "copy") == tree(tmp_path / "big"), "and no hidden file is left"
    assert all((tmp_path / "copy" / name).stat().st_mtime_ns == when for name, when in finished.items())
