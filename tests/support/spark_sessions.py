"""Spark sessions with other masters and settings than that of all tests, in the same JVM: a start of Java less."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from pyspark.sql import SparkSession

from jobs.cluster import Cluster
from jobs.daemons import HOST
from pipeline import spark

# What tests/conftest.py says to Java, without what it says to Spark: executors are not to be told that.
JAVA_OPTIONS = " ".join(
    option for option in os.environ.get("SPARK_SUBMIT_OPTS", "").split() if not option.startswith("-Dspark.")
)
# Settings of `spark_on`: queries are compiled, as without tests/conftest.py.
COMPILED = {"spark__sql__codegen__wholeStage": "true", "spark__sql__codegen__factoryMode": "FALLBACK"}


@contextmanager
def spark_on(master: str, **settings: str) -> Iterator[SparkSession]:
    """Let stages run on `master` in the block; behind it, on the session of all tests again.

    `settings`: Spark's names with __ for a dot.
    """
    named = {name.replace("__", "."): value for name, value in settings.items()}
    end_session()
    with patch.dict(os.environ, SPARK_MASTER=master), patch.dict(spark._SETTINGS, named):
        try:
            yield spark.spark_session()
        finally:
            end_session()


@contextmanager
def spark_on_cluster(cluster: Cluster, **settings: str) -> Iterator[SparkSession]:
    """The same on the cluster's master and workers, with files in as many replicas as it has DataNodes."""
    here = {
        "spark__driver__host": HOST,
        "spark__executor__extraJavaOptions": JAVA_OPTIONS,
        "spark__hadoop__dfs__replication": "2",
    }
    with spark_on(cluster.spark, **here | settings) as session:
        yield session


def end_session() -> None:
    """End the running session, if there is one, and its clients of HDFS.

    Hadoop keeps these in the JVM, with the settings of the session that made them.
    """
    running: Any = SparkSession.getActiveSession()
    if running is not None:
        java = running._jvm
        running.stop()
        java.org.apache.hadoop.fs.FileSystem.closeAll()
