"""Executors, tasks and drivers that die: the packs are those of a run that nothing disturbed, and nothing else is left.

Real HDFS and Spark daemons; faults are made by tests/support/faulty_pipeline.py.
"""

import os
import time
from contextlib import suppress

import psutil
import pytest
from pyspark.sql import SparkSession

from jobs.cluster import Cluster
from jobs.daemons import lives
from tests.support.fault_runs import OUTPUTS, PACKED, FaultRun
from tests.support.spark_sessions import spark_on_cluster

SPECULATION = {
    "spark__speculation": "true",
    "spark__speculation__interval": "100ms",
    "spark__speculation__quantile": "0.3",
    "spark__speculation__multiplier": "1.1",
    "spark__speculation__minTaskRuntime": "100ms",
}


def test_tasks_that_fail_twice_executors_killed_and_stragglers_overtaken(
    cluster: Cluster, fault_run: FaultRun, undisturbed: FaultRun
) -> None:
    """A straggler goes on after five minutes: without the copy that overtakes it the run would not end in time."""
    in_preprocess = ("preprocess:0:3:2:fail", "preprocess:2:6:1:straggle", "preprocess:3:5:1:kill")
    in_pack = ("pack:0:1:2:fail", "pack:1:2:1:kill", "pack:2:4:1:straggle")
    started = time.monotonic()
    with spark_on_cluster(cluster, **SPECULATION):
        fault_run.run_here(*in_preprocess, *in_pack)
    assert time.monotonic() - started < 290
    failed = {f"{where}-0-fail-{n}" for where in ("preprocess", "pack") for n in (0, 1)}
    killed = {"preprocess-3-kill-0", "pack-1-kill-0"}
    assert fault_run.happened() == failed | killed | {"preprocess-2-straggle-0", "pack-2-straggle-0"}
    assert fault_run.digest() == undisturbed.digest()


def test_drivers_killed_in_preprocess_and_in_pack_run_again_and_a_second_one_refused(
    cluster: Cluster,
    fault_run: FaultRun,
    undisturbed: FaultRun,
    spark: SparkSession,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for where, task, folder in (("preprocess", "2:6", "preprocess"), ("pack", "0:2", "packed")):
        dying = fault_run.beside(where)
        with dying.started(f"{where}:{task}:1:meet") as driver, dying.meeting(driver, where):
            driver.kill()
            driver.wait()
        (attempt,) = (fault_run.out / folder).names()
        assert attempt.startswith("_attempt-")
        wait_for_end_of_executors(cluster)
    second = fault_run.beside("second")
    capsys.readouterr()
    with (
        fault_run.running_here("pack:0:2:1:meet") as first,
        fault_run.meeting(first, "pack"),
        second.started() as driver,
    ):
        refusal = second.refused(driver)
    assert capsys.readouterr().out.count("already done, skipped") == len(OUTPUTS) - 1, "all but pack"
    assert f"{fault_run.out.path}/{PACKED} is being written by" in refusal
    assert f"process {os.getpid()} on" in refusal
    assert fault_run.digest() == undisturbed.digest()


def wait_for_end_of_executors(cluster: Cluster) -> None:
    """Wait until executors, and their Python workers, have ended by themselves, as their driver is gone."""
    deadline = time.monotonic() + 60
    while cluster.executors() or any("pyspark" in command for command in commands_below(cluster)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def commands_below(cluster: Cluster) -> list[str]:
    """Return the command lines of what the daemons have started, and that in turn."""
    found = []
    for daemon in cluster.running().values():
        with suppress(psutil.NoSuchProcess):
            for process in filter(lives, daemon.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                    found.append(" ".join(process.cmdline()))
    return found
