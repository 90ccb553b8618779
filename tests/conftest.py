"""Shared by all tests: no hub, short waits, one Spark session, and which tests may run beside each other."""

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Set before anything else is imported; what a test starts inherits them.
os.environ["HF_HUB_OFFLINE"] = "1"  # tests never touch a hub
os.environ["SPARK_MASTER"] = "local[2]"
os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
os.environ.setdefault("KANYUN_TIME_SCALE", "0.2")  # daemons that a test stops are back within seconds
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small gain nothing by more threads
# JVMs live for a minute here: with C1 alone a run of the pipeline takes 37 s of CPU time, with C2 behind it 58. By
# itself C1 has 48 MB for its code, which three runs of the pipeline fill; from then on Java would be interpreted.
# Spark compiles a class for each query, which is then used for a few rows: interpreted, a run in a JVM that has run it
# before takes 8.5 s of Java in place of 12.3, the first one 31 in place of 41. Compiled, as by default, are the stages
# of one run of test_recipe_digest.py and of one of test_odd_paths.py.
os.environ.setdefault(
    "SPARK_SUBMIT_OPTS",
    "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m -XX:+UseSerialGC"
    " -Dspark.sql.codegen.wholeStage=false -Dspark.sql.codegen.factoryMode=NO_CODEGEN",
)

MOST_THREADS = 150  # of a process: one run of the trainer has 70

# Groups of tests that share daemons or a Spark session, the longest first: runs of the pipeline with faults, on the
# daemons of a cluster; runs in a local session; and tests that need HDFS but no Spark, on daemons of their own. When
# they were in the first group, its process ran alone for the last quarter of the time.
_GROUPS = ("cluster", "spark", "hdfs")


def _group(item: pytest.Function) -> str:
    """Tests of one group run in one process of pytest-xdist: they share the cluster, the session, or a module."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    as_parameter = any(isinstance(value, str) and value == "hdfs" for value in parameters)  # takes it when it runs
    on_hdfs = as_parameter or "cluster" in item.fixturenames
    if "spark" in item.fixturenames:
        return "cluster" if on_hdfs else "spark"
    return "hdfs" if on_hdfs else item.path.stem


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if getattr(config.option, "loadgroup", False):
        for item in items:
            if isinstance(item, pytest.Function):
                _name_group(item)
    items.sort(key=_rank)


def _name_group(item: pytest.Function) -> None:
    """Give the test's id the suffix by which pytest-xdist knows its group.

    The mark xdist_group of pytest-xdist 3.8 sets a field that pytest 9.2 no longer reads. Without a word each test was
    then a group, and both processes started a cluster and a Spark session and ran the pipeline for every fixture.
    """
    group = _group(item)
    item._id = type(item.id).parse(f"{item.nodeid}@{group}")
    assert item.nodeid.endswith(f"@{group}"), "pytest has changed: tests that share a cluster are not kept together"


def _rank(item: pytest.Item) -> int:
    """Sort key: the longest groups first, tests of milliseconds last, so that all processes end together."""
    group = _group(item) if isinstance(item, pytest.Function) else ""
    if group in _GROUPS:
        return _GROUPS.index(group)
    return len(_GROUPS) + ("unit" in item.path.parts)


@pytest.fixture(scope="session")
def spark() -> Iterator["SparkSession"]:
    """The session that stages find running, on two cores. To set its conf, ask `spark_session()` for it: a test that
    uses another master (tests/support/spark_sessions.py) ends this one, and the next stage starts it anew."""
    from pipeline.spark import spark_session
    from tests.support.spark_sessions import end_session

    yield spark_session()
    end_session()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """Free models of earlier tests, which hold process groups in reference cycles that Python finds late.

    Each group's thread in gloo wakes a hundred times a second: 500 of them took most of a core.
    """
    if len(os.listdir("/proc/self/task")) > MOST_THREADS:
        gc.collect()
