"""Runs whose checkpoints are damaged, missing or out of reach: the newest whole one is taken, or none, and said so."""

import math
import re
import shutil
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.hf_writer import HFWriter
from convert.to_hf import to_hf
from kanyun.errors import UserError
from kanyun.storage import Folder
from tests.support.odd_folders import forget_digests
from tests.support.training_job import (
    WHOLE_STEPS,
    copy_of,
    curve,
    flip_a_byte,
    launch,
    metrics_of,
    steps_of,
    train,
)
from trainer.checkpoint.metadata import read_metadata
from trainer.config import TrainConfig
from trainer.run import Run, claimed, open_output


def test_the_newest_whole_checkpoint_is_taken_and_nothing_is_lost(
    text_run: dict[str, Any], job: dict[str, Any]
) -> None:
    root = copy_of(text_run, job)
    assert steps_of(job) == [f"step_{step:08d}" for step in (2, 4, 6, 8)]
    (root / "latest").unlink()
    (root.parent / "run.json").unlink()
    (root / "step_00000008" / "state.json").unlink()
    tensors = root / "step_00000006" / "__0_1.distcp"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    done = launch(job)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^passed over step_00000008: .* has no state.json", done.stdout, re.MULTILINE)
    assert re.search(r"^passed over step_00000006: .*__0_1.distcp has .* bytes instead of", done.stdout, re.MULTILINE)
    assert re.search("latest is missing; step_00000004 is the newest whole checkpoint", done.stdout)
    assert "step_00000006, step_00000008: newer than step 4, moved to" in done.stdout
    assert "4 line(s) of steps after 4 moved from metrics.jsonl to metrics.aside.jsonl" in done.stdout
    assert curve(job) == curve(text_run)
    (aside,) = root.glob("aside-*")
    assert sorted(path.name for path in aside.iterdir()) == ["step_00000006", "step_00000008"]
    assert len(Path(job["output"], "metrics.aside.jsonl").read_text().splitlines()) == 4


def test_a_newest_checkpoint_with_a_flipped_byte_is_passed_over(
    text_run: dict[str, Any], job: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    root = copy_of(text_run, job)
    flip_a_byte(root / "step_00000008" / "__0_1.distcp")
    flip_a_byte(root / "step_00000006" / "__0_0.distcp")
    train(job)
    said = capsys.readouterr().out
    for name in ("step_00000008/__0_1.distcp", "step_00000006/__0_0.distcp"):
        assert re.search(rf"^passed over step_0000000\d: .*{name} is damaged \(its digest is ", said, re.MULTILINE)
    assert f"going on from {root}/step_00000004" in said
    assert "step_00000006, step_00000008: newer than step 4, moved to" in said
    assert curve(job) == curve(text_run)

    # One that was asked for by its name is refused, and a run whose content is all damaged does not start anew.
    for name in ("step_00000004", "step_00000006", "step_00000008"):
        flip_a_byte(root / name / "__0_1.distcp")
    with pytest.raises(UserError, match=r"step_00000006/__0_1.distcp is damaged .*; `resume: 6` chose it"):
        train(job | {"resume": 6})
    before = metrics_of(job)
    flip_a_byte(root / "step_00000002" / "__0_1.distcp")
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole \(passed over step_00000008: .*is damaged"):
        train(job)
    assert metrics_of(job) == before


def test_a_moment_that_is_not_finite_is_named(text_run: dict[str, Any], job: dict[str, Any]) -> None:
    """In a checkpoint made before digests were recorded, which nothing else finds."""
    step = copy_of(text_run, job) / "step_00000008"
    forget_digests(step)
    moment = next(record for record in read_metadata(Folder(str(step))) if ".exp_avg." in record.key)
    content = bytearray((step / moment.file).read_bytes())
    stored = content[moment.offset : moment.offset + moment.size]
    values = torch.load(BytesIO(stored), weights_only=True).numpy().tobytes()
    at = moment.offset + stored.index(values)
    content[at : at + 4] = struct.pack("<f", math.nan)
    (step / moment.file).write_bytes(content)
    with pytest.raises(UserError, match=rf"step_00000008: {re.escape(moment.key)} has 1 of [\d,]+ values that are NaN"):
        train(job | {"steps": WHOLE_STEPS + 1})


def test_conversion_takes_the_newest_checkpoint_without_damage_and_says_so(
    text_run: dict[str, Any], job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copy_of(text_run, job)
    flip_a_byte(root / "step_00000008" / "__0_0.distcp")
    flip_a_byte(root / "step_00000006" / "hf" / "config.json")
    flip_a_byte(root / "step_00000004" / "__0_2.distcp")  # the optimizer's: not read
    to_hf(job["output"], tmp_path / "a")
    said = capsys.readouterr().out
    assert re.search(r"^passed over step_00000008: .*__0_0.distcp is damaged", said, re.MULTILINE)
    assert re.search(r"^passed over step_00000006: .*hf/config.json is damaged", said, re.MULTILINE)
    to_hf(str(root / "step_00000004"), tmp_path / "b")
    assert capsys.readouterr().out == ""
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"step_00000006/hf/config.json is damaged"):
        to_hf(str(root / "step_00000006"), tmp_path / "c")


def test_a_checkpoint_that_a_run_deletes_while_it_is_converted(
    text_run: dict[str, Any], job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run with `keep_last: 1` does at its next save. What is whole then is converted."""
    root, add = copy_of(text_run, job), HFWriter.add

    def deleted_before(writer: HFWriter, name: str, tensor: torch.Tensor) -> None:
        shutil.rmtree(root / "step_00000008", ignore_errors=True)
        add(writer, name, tensor)

    monkeypatch.setattr(HFWriter, "add", deleted_before)
    to_hf(job["output"], tmp_path / "a")
    to_hf(str(root / "step_00000006"), tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    monkeypatch.setattr(HFWriter, "add", lambda *arguments: shutil.rmtree(root / "step_00000006", ignore_errors=True))
    with pytest.raises(UserError, match=r"step_00000006/__0_0.distcp cannot be read \(No such file or directory\)"):
        to_hf(str(root / "step_00000006"), tmp_path / "c")


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/nowhere/disk"), Path.touch])
def test_checkpoints_that_cannot_be_reached_are_no_start_at_step_0(
    make: Callable[[Path], None], text_run: dict[str, Any], job: dict[str, Any]
) -> None:
    root = copy_of(text_run, job)
    shutil.rmtree(root)
    make(root)
    before = metrics_of(job)
    with pytest.raises(UserError, match="out/checkpoints is no folder, or a link to a disk that is not mounted"):
        Run.prepare(TrainConfig(**job), world_size=1, cuda=False)
    assert metrics_of(job) == before


def test_checkpoints_that_cannot_be_written_end_the_run_before_its_first_step(job: dict[str, Any]) -> None:
    output = Path(job["output"])
    output.mkdir()
    (output / "run.json").touch()
    (output / "checkpoints").symlink_to("/sys/kernel")
    with pytest.raises(UserError, match=r"^cannot write below .*/out/checkpoints.*: choose an output you may write to"):
        train(job)
    assert not (output / "metrics.jsonl").exists()


def test_an_output_may_be_a_disk_or_have_a_link_to_one_before_the_first_run(tmp_path: Path) -> None:
    out, larger = tmp_path / "out", tmp_path / "larger"
    larger.mkdir()
    (out / "lost+found").mkdir(parents=True)
    (out / "checkpoints").symlink_to(larger)
    assert open_output(str(out)).path == str(out)
    (larger / "somebody's").touch()
    with pytest.raises(UserError, match=r"/out holds something else \(checkpoints\): choose an empty or new output"):
        open_output(str(out))


def test_two_outputs_that_link_to_one_folder_for_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "larger").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoints").symlink_to(tmp_path / "larger")
    with (
        claimed(str(tmp_path / "a")),
        pytest.raises(UserError, match=r"/b/checkpoints is being written by process \d+ on "),
        claimed(str(tmp_path / "b")),
    ):
        pass
    assert list((tmp_path / "larger").iterdir()) == []


@pytest.mark.parametrize("key", ["init", "continue_from"])
def test_another_run_s_newest_checkpoint_with_a_flipped_byte_is_passed_over(
    key: str, text_run: dict[str, Any], job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(text_run["output"], tmp_path / "source")
    newest = tmp_path / "source" / "checkpoints" / "step_00000008"
    flip_a_byte(newest / "__0_0.distcp")
    train(job | {key: str(tmp_path / "source"), "steps": 1, "warmup_steps": 0})
    assert re.search(r"^passed over step_00000008: .* is damaged", capsys.readouterr().out, re.MULTILINE)
    flip_a_byte(newest / "__0_0.distcp")
    earlier = job | {key: str(newest.with_name("step_00000006")), "output": job["output"] + "-2"}
    assert train(earlier | {"steps": 1, "warmup_steps": 0})[0]["loss"] == metrics_of(job)[0]["loss"]
    flip_a_byte(newest / "__0_0.distcp")
    with pytest.raises(UserError, match=r"step_00000008/__0_0.distcp is damaged"):
        train(job | {key: str(newest), "output": job["output"] + "-3"})


def test_no_whole_checkpoint_is_no_start_at_step_0(text_run: dict[str, Any], job: dict[str, Any]) -> None:
    for state in copy_of(text_run, job).glob("step_*/state.json"):
        state.write_text("")
    before = metrics_of(job)
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole \(passed over step_00000008: .*damaged"):
        Run.prepare(TrainConfig(**job), world_size=1, cuda=False)
    assert metrics_of(job) == before
