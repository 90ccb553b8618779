"""Runs that nothing can lose: told to stop, killed, hung, two at once, a full disk, a DataNode that dies."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
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
from tests.support.checkpoints import write_step
from tests.support.processes import ROOT, Python
from tests.support.training_job import (
    WHOLE_STEPS,
    command,
    curve,
    environment,
    launch,
    start,
    steps_of,
    wait_for,
)
from trainer import checkpoint
from trainer.checkpoint.faults import faults
from trainer.stopping import HUNG, PREEMPTED


def test_told_to_stop_inside_a_save_it_saves_and_ends_with_85(text_run: dict[str, Any], job: dict[str, Any]) -> None:
    for at_step in (2, 4):
        with start(job, "save_every=2") as process:
            wait_for(Path(job["output"], "checkpoints", f".attempt-step_{at_step:08d}"), process)
            process.send_signal(signal.SIGTERM if at_step == 2 else signal.SIGUSR1)
            out, err = process.communicate(timeout=200)
        assert process.returncode == PREEMPTED, err
        saved = re.findall(rf"told to stop: saved step (\d+) of {WHOLE_STEPS}", out)
        assert len(saved) == 1
        assert steps_of(job)[-1] == f"step_{int(saved[0]):08d}"
        assert not list(Path(job["output"], "checkpoints").glob(".*"))
    assert launch(job).returncode == 0
    assert curve(job) == curve(text_run)


def test_the_launcher_hands_a_signal_to_its_ranks_and_starts_a_killed_one_again(
    text_run: dict[str, Any], job: dict[str, Any]
) -> None:
    values, metrics = job | {"save_every": 1}, Path(job["output"], "metrics.jsonl")
    with start(values, processes=2) as process:
        wait_for(metrics, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=200)
    assert process.returncode == PREEMPTED, err
    assert err.splitlines()[-1] == "error: stopped as told, and saved: the same command goes on"
    done = len(curve(values))
    assert done < WHOLE_STEPS
    with Python(command(values, processes=2), environment(RESTARTS="1")) as process:
        while metrics.read_bytes().count(b"\n") == done:
            assert process.poll() is None
            time.sleep(0.002)
        psutil.Process(process.pid).children()[1].kill()
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "starting again" in err
    assert curve(job) == pytest.approx(curve(text_run), rel=1e-3)


def test_the_launcher_ends_when_it_is_told_to_before_it_has_ranks() -> None:
    told = "import os; from trainer.launch import Launcher; Launcher([], []); os.kill(os.getpid(), 15)"
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == PREEMPTED
    assert done.stderr == "error: told to stop before the first step: the same command starts\n"


def test_ctrl_c_on_the_launcher_is_one_sentence(job: dict[str, Any]) -> None:
    with start(job, processes=1) as process:
        while not psutil.Process(process.pid).children():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "error: interrupted; the same command goes on or starts again"
    assert "Traceback" not in err


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


def test_a_second_run_on_one_output_is_refused_and_one_that_lost_its_claim_ends(job: dict[str, Any]) -> None:
    values, output = job | {"steps": 10_000, "save_every": 1, "validation": None}, Path(job["output"])
    with start(values) as first:
        wait_for(output / "checkpoints" / "latest", first)
        done = launch(values)
        assert done.returncode == 2
        assert f"is being written by process {first.pid} on " in done.stderr.splitlines()[-1]
        (claim,) = output.glob("_writer-*")
        claim.unlink()  # as another run does that takes this one for dead
        out, err = first.communicate(timeout=200)
    assert first.returncode == 2, err
    assert re.search(r"error: 3 saves in a row failed; .*/out has lost this run's claim", err.splitlines()[-1])
    assert "metrics.jsonl cannot be written (this run has lost its claim): its lines wait in memory" in out


def test_a_full_disk_stops_no_training_until_the_third_time(job: dict[str, Any], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        values = job | {"output": str(disk / "out"), "save_every": 1, "keep_last": 1, "steps": WHOLE_STEPS}
        done = launch(values, "steps=2")
        assert done.returncode == 0, done.stderr
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
        done = launch(values)
        assert done.returncode == 2, done.stderr
        assert re.search(
            r"checkpoint step_00000003 was not written \(.*/out/checkpoints has 0\.\d MB free, \d\.\d MB are needed",
            done.stdout,
        )
        assert re.search(
            r"/out/checkpoints has room for \d\.\d MB of checkpoints, keep_last 1 and the one being", done.stdout
        )
        assert "error: 3 saves in a row failed; the last: checkpoint step_00000005 was not written" in done.stderr
        assert "Traceback" not in done.stderr
        newest = checkpoint.latest(Folder(values["output"]))
        assert newest is not None
        assert (newest.name, faults(newest)) == ("step_00000002", [])
        with pytest.raises(UserError, match=r"^(cannot write below )?(file://)?/\S+/disk/hf (has 0\.|\(\[Errno 28\])"):
            to_hf(values["output"], disk / "hf")
        assert sorted(path.name for path in disk.iterdir()) == ["other", "out", "out.yaml"]
        (disk / "other").unlink()
        assert launch(values).returncode == 0
        assert steps_of(values) == [f"step_{WHOLE_STEPS:08d}"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


KILLS = int(os.environ.get("SOAK_KILLS", "4"))  # `make soak` does 40, 15 of them inside of a save


def kills() -> Iterator[tuple[bool, bool]]:
    """(inside of a save, all ranks) of each."""
    for number in range(KILLS):
        print(f"kill {number + 1} of {KILLS}", flush=True)
        yield number < KILLS * 15 // 40 + 1, number % 2 == 0


@pytest.mark.timeout(600 + 90 * KILLS)  # seconds; on a busy machine a kill takes a minute
def test_killed_at_random_moments_it_loses_nothing(text_run: dict[str, Any], job: dict[str, Any]) -> None:
    seed = int(os.environ.get("SOAK_SEED", time.time_ns() % 10**6))
    print(f"SOAK_SEED={seed}")
    draw, root = random.Random(seed), Path(job["output"], "checkpoints")
    for inside, everyone in kills():
        if steps_of(job)[-1:] == [f"step_{WHOLE_STEPS:08d}"]:
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
    assert curve(job) == pytest.approx(curve(text_run), rel=1e-3)


def test_checkpoints_on_hdfs_survive_a_datanode(
    cluster: Cluster, text_run: dict[str, Any], job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert names == ["latest", *(f"step_{step:08d}" for step in range(WHOLE_STEPS - 3, WHOLE_STEPS + 1))]
    assert [fault for name in names[1:] for fault in faults(checkpoint.checkpoints_of(output) / name)] == []
    again = launch(values, "resume=6", f"steps={WHOLE_STEPS + 1}")  # read back, by another number of ranks
    assert again.returncode == 0, again.stderr
    assert (
        f"the schedule changed (steps {WHOLE_STEPS} -> {WHOLE_STEPS + 1}): the learning rate goes from" in again.stdout
    )
    lines = [json.loads(line) for line in output.read("metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, WHOLE_STEPS + 2))
    assert [line["loss"] for line in lines][:7] == pytest.approx(curve(text_run)[:7], rel=1e-3)
    monkeypatch.setattr(Folder, "digest", lambda folder, name: "0" * 32)  # HDFS returns other bytes than were written
    with pytest.raises(UserError, match=r"/__0_0.distcp reads back as 0{32}, written was \w{32}$"):
        write_step(output.parent / "other", 1)
