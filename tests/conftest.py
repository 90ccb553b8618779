"""Shared by all tests: no hub, and one Spark session."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests never touch a hub
os.environ["SPARK_MASTER"] = "local[2]"


@pytest.fixture(scope="session")
def spark() -> Iterator["SparkSession"]:
    """The session that stages find running, on two cores."""
    from pipeline.spark import spark_session

    session = spark_session()
    yield session
    session.stop()
