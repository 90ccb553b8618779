"""HDFS that fails under the pipeline, or refuses: the packs of an undisturbed run, or one sentence; nothing is left."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
from pyspark.sql import SparkSession

from jobs.cluster import Cluster
from kanyun.storage import retries
from tests.support.fault_runs import FaultRun, namenode_away
from tests.support.spark_sessions import spark_on_cluster

# Timeouts as in production, not scaled: the NameNode is away for 2 s and as long as it takes to start.
# Without the retries of our own settings Hadoop's client would give it up after 2 s, not after 10.
RETRIES = {
    "spark__hadoop__dfs__client__retry__policy__spec": "3000,10",
    "spark__hadoop__ipc__client__connect__max__retries": "2",
}


@pytest.fixture(autouse=True)
def sound(cluster: Cluster) -> Iterator[None]:
    """All daemons are up before the next test."""
    yield
    for name in {"namenode", "datanode-1", "datanode-2"} - cluster.running().keys():
        cluster.start(name)
    cluster.wait_for_hdfs()


def test_refusals_then_namenode_away_in_preprocess_and_datanode_killed_in_pack(
    cluster: Cluster, fault_run: FaultRun, undisturbed: FaultRun, spark: SparkSession
) -> None:
    """One after the other on one output, which in the end is what it would have been."""
    out = fault_run.out
    out.make()
    cluster.shell("-chmod", "755", out.path)
    with fault_run.started(HADOOP_USER_NAME="somebody", SPARK_MASTER="local[2]") as driver:
        assert "Permission denied: user=somebody, access=WRITE" in fault_run.refused(driver)
    assert out.files() == []

    safe = fault_run.beside("safe")

    def enter_safe_mode() -> None:
        with safe.meeting(None, "preprocess"):
            cluster.dfsadmin("-safemode", "enter")

    with ThreadPoolExecutor(1) as other:
        entered = other.submit(enter_safe_mode)
        try:
            assert "in safe mode" in safe.refused_here("preprocess:1:4:1:meet")
        finally:
            entered.result()
            cluster.dfsadmin("-safemode", "leave")

    cluster.dfsadmin("-setSpaceQuota", "1m", out.path)  # less than a block, so nothing can be written
    assert "quota" in fault_run.refused_here()
    cluster.dfsadmin("-setSpaceQuota", "40m", out.path)  # two blocks of 8 MiB in two replicas, while they are written
    assert "The DiskSpace quota of" in fault_run.refused_here()
    cluster.dfsadmin("-clrSpaceQuota", out.path)

    faults = ("preprocess:1:4:1:meet", "pack:0:2:1:meet")
    with (
        patch.object(retries, "_PAUSES", (1, 3, 9, 20, 30)),
        spark_on_cluster(cluster, **RETRIES),
        fault_run.running_here(*faults) as run,
    ):
        with fault_run.meeting(run, "preprocess"), namenode_away(cluster, 2):
            (fault_run.here / "preprocess-go").touch()
        with fault_run.meeting(run, "pack"):
            cluster.kill("datanode-1")
    assert fault_run.digest() == undisturbed.digest()
