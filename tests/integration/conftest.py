"""For tests on real daemons: HDFS and Spark as processes, on free ports, for the whole test session."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from jobs.cluster import Cluster, temporary_cluster
from kanyun.storage import Folder
from kanyun.transfer import copy_folder
from pipeline.recipe import Recipe
from tests.support.fault_runs import FaultRun, recipe_for
from tests.support.qwen_assets import tiny_vl_folder
from tests.support.raw_conversations import raw_files, write_raw
from tests.support.training_job import WHOLE_STEPS, train, write_job


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """All daemons up. A test that stops one starts it again. Blocks of 8 MiB, so that files have several."""
    with temporary_cluster(tmp_path_factory.mktemp("cluster"), block_mib=8) as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> FaultRun:
    """A run that nothing disturbs, on local folders and local Spark: what all others are compared with."""
    here = tmp_path_factory.mktemp("undisturbed")
    write_raw(here / "raw", sorted(raw_files()))
    model = tiny_vl_folder(here / "hf", max_pixels=32 * 28 * 28)
    run = FaultRun(str(here / "raw"), model, Folder(str(here / "out")), here)
    run.run_here()
    return run


@pytest.fixture(scope="session")
def on_hdfs(
    cluster: Cluster, undisturbed: FaultRun, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Folder]:
    """The same raw folder on HDFS, the recipe that reads it there in tasks of the usual size, and its output."""
    root = Folder(f"{cluster.hdfs}/{tmp_path_factory.mktemp('on_hdfs').name}")
    copy_folder(Folder(undisturbed.raw), root / "raw", "put")
    recipe = recipe_for(root, undisturbed.model)
    recipe.run(overwrite=False)
    return recipe, root / "out"


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of a run of text in this process that nothing disturbed: WHOLE_STEPS steps, saved every two."""
    values = write_job(tmp_path_factory.mktemp("runs"), images=False, packs=4 * WHOLE_STEPS)
    values |= {"steps": WHOLE_STEPS, "save_every": 2, "validate_every": WHOLE_STEPS, "keep_last": 4}
    train(values)
    return values


@pytest.fixture
def job(text_run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same config with another output, where nothing is yet."""
    return text_run | {"output": str(tmp_path / "out")}


@pytest.fixture
def fault_run(cluster: Cluster, undisturbed: FaultRun, tmp_path: Path) -> FaultRun:
    """The same on HDFS and the cluster's Spark, into its own folder; the test runs it."""
    raw = f"{cluster.hdfs}/faults/raw"
    copy_folder(Folder(undisturbed.raw), Folder(raw), "put")  # what is there is not copied again
    return FaultRun(raw, undisturbed.model, Folder(f"{cluster.hdfs}/{tmp_path.name}"), tmp_path, cluster.env)
