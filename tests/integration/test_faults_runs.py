"""Runs that nothing can lose: told to stop, killed, hung, two at once, a full disk, damaged saves, other ranks."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from convert.to_hf import to_hf
from jobs.cluster import Cluster
from kanyun.errors import UserError
from kanyun.storage import Folder
from kanyun.storage.claim import only_writer
from tests.support.training_job import (
    ROOT,
    command,
    environment,
    launch,
    metrics_of,
    start,
    train,
    wait_for,
    write_job,
)
from trainer import checkpoint
from trainer.checkpoint.verify import faults
from trainer.config import TrainConfig
from trainer.stopping import HUNG, PREEMPTED
from trainer.trainer import Run

STEPS = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of text in this process that nothing disturbs."""
    values = write_job(tmp_path_factory.mktemp("runs"), images=False, packs=4 * STEPS)
    values |= {"steps": STEPS, "save_every": 2, "validate_every": STEPS, "keep_last": 4}
    train(values)
    return values


@pytest.fixture
def job(whole: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return whole | {"output": str(tmp_path / "out")}


def curve(values: dict[str, Any], name: str = "loss") -> list[float]:
    metrics = metrics_of(values)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))  # each step once
    return [line[name] for line in metrics]


def steps_of(values: dict[str, Any]) -> list[str]:
    return [path.name for path in sorted(Path(values["output"], "checkpoints").glob("step_*"))]


def copy_of(whole: dict[str, Any], job: dict[str, Any]) -> Path:
    """Copy a finished run to the job's output; return its checkpoints."""
    shutil.copytree(whole["output"], job["output"])
    return Path(job["output"], "checkpoints")


def test_told_to_stop_inside_a_save_it_saves_and_ends_with_85(whole: dict[str, Any], job: dict[str, Any]) -> None:
    for at_step in (2, 4):
        with start(job, "save_every=2") as process:
            wait_for(Path(job["output"], "checkpoints", f".attempt-step_{at_step:08d}"), process)
            process.send_signal(signal.SIGTERM if at_step == 2 else signal.SIGUSR1)
            out, err = process.communicate(timeout=200)
        assert process.returncode == PREEMPTED, err
        saved = re.findall(rf"told to stop: saved step (\d+) of {STEPS}", out)
        assert len(saved) == 1
        assert steps_of(job)[-1] == f"step_{int(saved[0]):08d}"
        assert not list(Path(job["output"], "checkpoints").glob(".*"))
    assert launch(job).returncode == 0
    assert curve(job) == curve(whole)


def test_the_launcher_hands_the_signal_to_its_ranks(whole: dict[str, Any], job: dict[str, Any]) -> None:
    with start(job, processes=2) as process:
        wait_for(Path(job["output"], "metrics.jsonl"), process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=200)
    assert process.returncode == PREEMPTED, err
    assert err.splitlines()[-1] == "error: stopped as told, and saved: the same command goes on"
    assert launch(job, processes=2).returncode == 0
    assert curve(job) == pytest.approx(curve(whole), rel=1e-3)


def test_a_killed_rank_is_started_again(whole: dict[str, Any], job: dict[str, Any]) -> None:
    line = command(job, processes=2)
    with subprocess.Popen(line, cwd=ROOT, env=environment(RESTARTS="1"), stderr=subprocess.PIPE, text=True) as process:
        wait_for(Path(job["output"], "checkpoints", "step_00000002"), process)
        psutil.Process(process.pid).children()[1].kill()
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "starting again" in err
    assert curve(job) == pytest.approx(curve(whole), rel=1e-3)


def test_a_rank_that_hangs_is_named(job: dict[str, Any]) -> None:
    with start(job, "hang_after=8", processes=2) as process:
        wait_for(Path(job["output"], "metrics.jsonl"), process)
        stopped = psutil.Process(process.pid).children()[1]
        stopped.suspend()
        began = time.monotonic()
        _, err = process.communicate(timeout=200)
    assert process.returncode == HUNG, err
    assert f"no progress for 8 s (hang_after): waited for rank 1 (process {stopped.pid} on " in err.splitlines()[-1]
    assert "which gives no sign; rank 0 is in gloo:" in err.splitlines()[-1]  # by torch's flight recorder
    assert time.monotonic() - began < 150  # torchrun gives the stopped one 30 s


def test_a_second_run_on_one_output_is_refused_and_names_the_first(job: dict[str, Any]) -> None:
    folder = Folder(job["output"])
    folder.make()
    with only_writer(folder):  # this process is the first run
        done = launch(job)
    assert done.returncode == 2
    assert f"is being written by process {os.getpid()} on " in done.stderr.splitlines()[-1]
    assert not Path(job["output"], "checkpoints").exists()


def test_the_newest_whole_checkpoint_is_taken_and_nothing_is_lost(whole: dict[str, Any], job: dict[str, Any]) -> None:
    root = copy_of(whole, job)
    assert steps_of(job) == [f"step_{step:08d}" for step in (2, 4, 6, 8)]
    (root / "latest").unlink()
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
    assert curve(job) == curve(whole)
    (aside,) = root.glob("aside-*")
    assert sorted(path.name for path in aside.iterdir()) == ["step_00000006", "step_00000008"]
    assert len(Path(job["output"], "metrics.aside.jsonl").read_text().splitlines()) == 4


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_newest_checkpoint_with_a_flipped_byte_is_passed_over(
    whole: dict[str, Any], job: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    root = copy_of(whole, job)
    flip_a_byte(root / "step_00000008" / "__0_1.distcp")
    flip_a_byte(root / "step_00000006" / "__0_0.distcp")
    train(job)
    said = capsys.readouterr().out
    for name in ("step_00000008/__0_1.distcp", "step_00000006/__0_0.distcp"):
        assert re.search(rf"^passed over step_0000000\d: .*{name} is damaged \(its digest is ", said, re.MULTILINE)
    assert f"going on from {root}/step_00000004" in said
    assert "step_00000006, step_00000008: newer than step 4, moved to" in said
    assert curve(job) == curve(whole)

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


def test_conversion_takes_the_newest_checkpoint_without_damage_and_says_so(
    whole: dict[str, Any], job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copy_of(whole, job)
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


@pytest.mark.parametrize("key", ["init", "continue_from"])
def test_another_run_s_newest_checkpoint_with_a_flipped_byte_is_passed_over(
    key: str, whole: dict[str, Any], job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole["output"], tmp_path / "source")
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


def test_a_refused_command_leaves_no_output_folder(job: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "new" / "runs" / "x"
    for change in ("data=/nowhere", "trainable=nothing"):
        done = launch(job, f"output={output}", change)
        assert done.returncode == 2, done.stderr
        assert not (tmp_path / "new").exists()
    output.mkdir(parents=True)
    launch(job, f"output={output}", "data=/nowhere")
    assert list(output.iterdir()) == []


def test_a_clock_that_jumps_changes_nothing(
    whole: dict[str, Any], job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, clock = random.Random(1), time.time
    monkeypatch.setattr(time, "time", lambda: clock() + draw.uniform(-1e6, 1e6))  # 12 days
    train(job | {"steps": STEPS - 3})
    assert steps_of(job) == [f"step_{step:08d}" for step in (2, 4, 5)]
    train(job)
    assert curve(job, "trained_tokens") == curve(whole, "trained_tokens")
    assert curve(job)[-1] == pytest.approx(curve(whole)[-1], rel=0.05)  # the schedule was another one up to step 5
    assert all(0 < seconds < 1000 for seconds in curve(job, "seconds"))


def test_no_whole_checkpoint_is_no_start_at_step_0(whole: dict[str, Any], job: dict[str, Any]) -> None:
    for state in copy_of(whole, job).glob("step_*/state.json"):
        state.write_text("")
    before = metrics_of(job)
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole \(passed over step_00000008: .*damaged"):
        Run.prepare(TrainConfig(**job), world=1, cuda=False)
    assert metrics_of(job) == before


def test_resume_chooses_a_step_once(whole: dict[str, Any], job: dict[str, Any]) -> None:
    root = copy_of(whole, job)
    chosen = Run.prepare(TrainConfig(**job | {"resume": 4}), world=1, cuda=False)
    assert (chosen.start.step, chosen.resume and chosen.resume.name) == (4, "step_00000004")
    with start(job, "resume=4") as process:
        wait_for(root / ".attempt-step_00000006", process)
        process.kill()
    again = Run.prepare(TrainConfig(**job | {"resume": 4}), world=1, cuda=False)  # the same command, after a kill
    assert again.start.step in (4, 6)
    train(job | {"resume": 4})
    assert Run.prepare(TrainConfig(**job | {"resume": 4}), world=1, cuda=False).start.step == STEPS
    assert curve(job) == curve(whole)
    (aside,) = root.glob("aside-*")
    elsewhere = Run.prepare(TrainConfig(**job | {"resume": str(aside / "step_00000006")}), world=1, cuda=False)
    assert elsewhere.start.step == 6
    with pytest.raises(UserError, match=r"step_00000005 has no state\.json"):
        Run.prepare(TrainConfig(**job | {"resume": 5}), world=1, cuda=False)


def test_a_full_disk_stops_no_training_until_the_third_time(job: dict[str, Any], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        values = job | {"output": str(disk / "out"), "save_every": 1, "keep_last": 1, "steps": STEPS}
        done = launch(values, "steps=2")
        assert done.returncode == 0, done.stderr
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
        done = launch(values)
        assert done.returncode == 2, done.stderr
        assert re.search(
            r"checkpoint step_00000003 was not written \(.*/out has 0\.\d MB free, \d\.\d MB are needed", done.stdout
        )
        assert re.search(r"/out has room for \d\.\d MB of checkpoints, keep_last 1 and the one being", done.stdout)
        assert "error: 3 saves in a row failed; the last: checkpoint step_00000005 was not written" in done.stderr
        assert "Traceback" not in done.stderr
        newest = checkpoint.latest(Folder(values["output"]))
        assert newest is not None
        assert (newest.name, faults(newest)) == ("step_00000002", [])
        (disk / "other").unlink()
        assert launch(values).returncode == 0
        assert steps_of(values) == [f"step_{STEPS:08d}"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_run_continues_with_another_batch_and_schedule_and_keeps_its_optimizer(
    whole: dict[str, Any], job: dict[str, Any]
) -> None:
    changes = {
        "continue_from": whole["output"],
        "global_batch": 8,
        "steps": 3,
        "lr": 1e-3,
        "warmup_steps": 0,
        "seed": 5,
    }
    done = launch(job | changes)
    assert done.returncode == 0, done.stderr
    assert "the position in the data starts anew" in done.stdout
    lines = metrics_of(job)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["lr"] == 1e-3
    state = checkpoint.read_state(checkpoint.resolve(job["output"]))
    assert (state.updates_before, state.updates, state.consumed) == (STEPS, STEPS + 3, 24)
    before, after = (optimizer_of(values) for values in (whole, job))
    assert before.keys() == after.keys()
    # exp_avg_sq decays by 0.95 a step: without the kept one, it would be about 0.05 of the gradients' squares.
    fresh = json.loads(json.dumps(job | changes | {"continue_from": None, "init": whole["output"]}))
    train(fresh | {"output": job["output"] + "-fresh"})
    unkept = optimizer_of(fresh | {"output": job["output"] + "-fresh"})
    moments = [name for name in after if ".exp_avg_sq." in name]
    assert sum(after[name] for name in moments) > 1.5 * sum(unkept[name] for name in moments)
    with pytest.raises(UserError, match="made with trainable all, this run has language"):
        Run.prepare(TrainConfig(**job | changes | {"output": job["output"] + "-2", "trainable": "language"}), 1, False)


def optimizer_of(values: dict[str, Any]) -> dict[str, float]:
    """Sums of the optimizer's tensors in the newest checkpoint, by name."""
    import io

    import torch

    step = checkpoint.resolve(values["output"])
    sums: dict[str, float] = {}
    for index, stored in checkpoint.read_metadata(step).storage_data.items():
        if index.fqn.startswith("optimizer."):
            data = step.read(stored.relative_path, stored.offset, stored.length)
            value = float(torch.load(io.BytesIO(data), weights_only=True).double().sum())
            sums[index.fqn] = sums.get(index.fqn, 0.0) + value
    return sums


def test_more_steps_say_what_becomes_of_the_learning_rate(whole: dict[str, Any], job: dict[str, Any]) -> None:
    copy_of(whole, job)
    longer = TrainConfig(**job | {"steps": 2 * STEPS})
    sentence = Run.prepare(longer, world=1, cuda=False).schedule_change(2 * STEPS)
    assert sentence.startswith(f"the schedule changed (steps {STEPS} -> {2 * STEPS}): the learning rate goes from ")
    last, following = (float(value) for value in re.findall(r"(\d\.\d+e-\d+) in step", sentence))
    assert last == pytest.approx(curve(whole, "lr")[-1], rel=1e-3)
    assert following > 8 * last
    assert Run.prepare(TrainConfig(**job), world=1, cuda=False).schedule_change(STEPS) == ""


def test_any_number_of_ranks_goes_on_with_the_same_samples(
    whole: dict[str, Any], job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved at 1, loaded at 2; saved at 2, loaded at 4; saved at 4, loaded at 1."""
    values, steps = job | {"validation": None, "save_every": 100}, []
    for ranks, upto in ((1, 2), (2, 4), (4, 6), (1, 8)):
        notes = tmp_path / f"{ranks}-{upto}"
        notes.mkdir()
        monkeypatch.setenv("NOTES", str(notes))
        done = launch(values, f"steps={upto}", processes=ranks, main="tests/support/noting_trainer.py")
        assert done.returncode == 0, done.stderr
        steps += samples(notes, ranks, 2)
    monkeypatch.setenv("NOTES", str(tmp_path))
    alone = values | {"output": str(tmp_path / "alone")}
    assert launch(alone, processes=1, main="tests/support/noting_trainer.py").returncode == 0
    undisturbed = samples(tmp_path, 1, STEPS)
    assert steps == undisturbed
    assert len({tuple(step) for step in steps}) == STEPS
    assert all(len(step) >= 4 for step in steps)


def samples(notes: Path, ranks: int, steps: int) -> list[list[int]]:
    """The sorted sample ids of each of the first `steps`, over the ranks' micro-batches of one pack, 4 a step."""
    each = 4 // ranks
    lines = [(notes / f"rank-{rank}.txt").read_text().splitlines() for rank in range(ranks)]
    return [
        sorted(int(word) for rank in lines for line in rank[step * each : (step + 1) * each] for word in line.split())
        for step in range(steps)
    ]


def kills() -> Iterator[tuple[bool, bool]]:
    """(inside of a save, all ranks) of each; `make soak` does 40, 15 of them inside of a save."""
    count = int(os.environ.get("SOAK_KILLS", "4"))
    for number in range(count):
        yield number < count * 15 // 40 + 1, number % 2 == 0


def test_killed_at_random_moments_it_loses_nothing(whole: dict[str, Any], job: dict[str, Any]) -> None:
    seed = int(os.environ.get("SOAK_SEED", time.time_ns() % 10**6))
    print(f"SOAK_SEED={seed}")
    draw, root = random.Random(seed), Path(job["output"], "checkpoints")
    for inside, everyone in kills():
        if steps_of(job)[-1:] == [f"step_{STEPS:08d}"]:
            shutil.rmtree(job["output"])
        with start(job, "save_every=1", processes=2) as process:
            moment = time.monotonic() + draw.uniform(2, 20)
            while process.poll() is None and not (
                list(root.glob(".attempt-*")) if inside else time.monotonic() > moment
            ):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.05))
            ranks = psutil.Process(process.pid).children() if process.poll() is None else []
            for rank in ranks if everyone else ranks[:1]:
                rank.kill()
            process.communicate(timeout=300)
        if root.exists() and steps_of(job):
            newest = checkpoint.latest(Folder(job["output"]))
            assert newest is not None
            assert faults(newest) == []
    done = launch(job, "save_every=1", processes=2)
    assert done.returncode == 0, done.stderr
    assert curve(job) == pytest.approx(curve(whole), rel=1e-3)


def test_checkpoints_on_hdfs_survive_a_datanode(
    cluster: Cluster, whole: dict[str, Any], job: dict[str, Any], tmp_path: Path
) -> None:
    output = Folder(f"{cluster.hdfs}/{tmp_path.name}/out")
    values = job | {"output": output.uri, "save_every": 1}
    with start(values, processes=2) as process:
        while not [name for name in checkpoint.checkpoints_of(output).names() if name.startswith(".attempt-")]:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        cluster.kill("datanode-1")
        try:
            _, err = process.communicate(timeout=280)
        finally:
            cluster.start("datanode-1")
            cluster.wait_for_hdfs()
    assert process.returncode == 0, err
    names = checkpoint.checkpoints_of(output).names()
    assert names == ["latest", *(f"step_{step:08d}" for step in range(STEPS - 3, STEPS + 1))]
    assert [fault for name in names[1:] for fault in faults(checkpoint.checkpoints_of(output) / name)] == []
    again = launch(values, "resume=6", f"steps={STEPS + 1}", processes=1)  # read back, by another number of ranks
    assert again.returncode == 0, again.stderr
    lines = [json.loads(line) for line in output.read("metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 2))
    assert [line["loss"] for line in lines][:7] == pytest.approx(curve(whole)[:7], rel=1e-3)
