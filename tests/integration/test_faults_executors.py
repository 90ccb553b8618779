"""Executors, tasks and drivers that die: the packs are those of a run that nothing disturbed, and nothing else is left.

Real HDFS and Spark daemons; faults are made by tests/faulty_pipeline.py.
"""

import time

import psutil

from jobs.cluster import Cluster
from tests.fault_runs import PACKED, FaultRun, namenode_away

SPECULATION = (
    "--conf spark.speculation=true --conf spark.speculation.interval=100ms --conf spark.speculation.quantile=0.3 "
    "--conf spark.speculation.multiplier=1.1 --conf spark.speculation.minTaskRuntime=100ms"
)


def test_executors_killed_and_tasks_that_fail_twice(fault_run: FaultRun, undisturbed: FaultRun) -> None:
    fault_run.run("preprocess:0:3:2:fail", "preprocess:3:5:1:kill", "pack:0:1:2:fail", "pack:1:2:1:kill")
    failed = {f"{where}-0-fail-{n}" for where in ("preprocess", "pack") for n in (0, 1)}
    assert fault_run.happened() == failed | {"preprocess-3-kill-0", "pack-1-kill-0"}
    assert fault_run.digest() == undisturbed.digest()


def test_stragglers_are_overtaken_by_speculation(fault_run: FaultRun, undisturbed: FaultRun) -> None:
    fault_run.run("preprocess:2:6:1:straggle", "pack:0:2:1:straggle", conf=SPECULATION)
    assert fault_run.happened() == {"preprocess-2-straggle-0", "pack-0-straggle-0"}
    assert fault_run.digest() == undisturbed.digest()


def test_drivers_killed_in_preprocess_and_in_pack_and_run_again(
    cluster: Cluster, fault_run: FaultRun, undisturbed: FaultRun
) -> None:
    for where, folder in (("preprocess:2:6", "preprocess"), ("pack:0:2", "packed")):
        with fault_run.started(f"{where}:1:meet") as driver, fault_run.meeting(driver, where.split(":")[0]):
            driver.kill()
            driver.wait()
        (attempt,) = (fault_run.out / folder).names()
        assert attempt.startswith("_attempt-")
        wait_for_end_of_executors(cluster)
    said = fault_run.run()
    assert said.count("already done, skipped") == 4, "all but pack"
    assert fault_run.digest() == undisturbed.digest()


def test_second_driver_is_refused_and_the_first_goes_on_after_the_namenode_was_away(
    cluster: Cluster, fault_run: FaultRun, undisturbed: FaultRun
) -> None:
    second = FaultRun(fault_run.raw, fault_run.model, fault_run.out, fault_run.here / "second")
    second.here.mkdir()
    with fault_run.started("pack:0:2:1:meet") as first, fault_run.meeting(first, "pack"):
        with second.started() as driver:
            said = second.refused(driver)
        assert f"{fault_run.out.path}/{PACKED} is being written by" in said
        assert f"process {first.pid} on" in said
        with namenode_away(cluster, 20):
            (fault_run.here / "pack-go").touch()
        fault_run.ended(first)
    assert fault_run.digest() == undisturbed.digest()


def wait_for_end_of_executors(cluster: Cluster) -> None:
    """They end by themselves when their driver is gone, and their Python workers with them."""
    deadline = time.monotonic() + 60
    while cluster.executors() or any("pyspark" in " ".join(child.cmdline()) for child in below(cluster)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def below(cluster: Cluster) -> list[psutil.Process]:
    children = [child for process in cluster.running().values() for child in process.children(recursive=True)]
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
