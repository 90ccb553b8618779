"""Runs of the pipeline on real daemons, for tests that break something: start one, meet it, see what it left."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cluster import Cluster
from kanyun.errors import UserError
from kanyun.manifest import Manifest
from kanyun.naming import dataset_name
from kanyun.storage import Folder
from kanyun.verify import verify
from pipeline.recipe import Recipe, RecipeDataset
from pipeline.spark import spark_session
from pipeline.stages.table import STAGES
from tests.support.faulty_pipeline import small_tasks
from tests.support.spark_sessions import JAVA_OPTIONS

ROOT = Path(__file__).parents[2]
LENGTH = 256
EXECUTORS = f"--conf 'spark.executor.extraJavaOptions={JAVA_OPTIONS}'"
PACKED = f"packed/{dataset_name(LENGTH, 0, 0)}"
# The outputs of its stages, in their order.
OUTPUTS = [f"{stage.output}/chat" if stage.per_path else stage.output for stage in STAGES[:-1]] + [PACKED]
# What a finished run may consist of (.crc: Spark's on a local disk); every blob must be named by a row as well.
_FILES = re.compile(
    r"ratios\.yaml|index\.html|.*/\.[^/]*\.crc|.*/report\.(json|html)|.*/tokenizer/[\w.]+|.*/blobs/\w{32}\.blob"
    rf"|({'|'.join(OUTPUTS[:-1])})/(data|quarantine)/(_SUCCESS|part-[^/]*\.parquet)"
    rf"|{PACKED}/(manifest\.json|batches\.arrow|shard-\d+-of-\d+\.arrow|lineage/lineage-\d+-of-\d+\.parquet)"
)


@dataclass(frozen=True)
class FaultRun:
    """One recipe, in its own folder on some storage, on some Spark."""

    raw: str
    model: Path
    out: Folder
    here: Path  # local folder for the recipe and for files that processes see
    master: Mapping[str, str] = field(default_factory=dict)  # environment; none: local[2]

    @contextmanager
    def started(self, *faults: str, conf: str = "", **environment: str) -> Iterator[subprocess.Popen[str]]:
        """The driver, which is killed if the block ends before it."""
        command = [sys.executable, "-m", "tests.support.faulty_pipeline", self._recipe(), str(self.here), *faults]
        options = {"PYSPARK_SUBMIT_ARGS": f"{EXECUTORS} {conf} pyspark-shell"}
        env = {**os.environ, **self.master, **options, **environment}
        with (self.here / "stderr").open("w") as errors:
            driver = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
            try:
                yield driver
            finally:
                driver.kill()
                driver.communicate()

    def _recipe(self) -> str:
        settings = {"output": self.out.uri, "tokenizer": str(self.model), "length": LENGTH, "seed": 3}
        datasets = {"chat": {"raw": self.raw, "dataset": "messages", "ratio": 0.7}}
        recipe = self.here / "recipe.yaml"
        recipe.write_text(json.dumps(settings | {"datasets": datasets}))  # JSON is YAML
        return str(recipe)

    def run_here(self, *faults: str) -> None:
        """The same in this process, on the Spark session of all tests: a start of Spark less."""
        with small_tasks(self.here, faults):
            Recipe.load(self._recipe()).run(overwrite=False)

    @contextmanager
    def running_here(self, *faults: str) -> Iterator["Future[None]"]:
        """`run_here` in a thread beside the block: a daemon that another thread than the main one starts ends with it,
        see Cluster."""
        session: Any = spark_session()

        def run() -> None:
            session._jvm.SparkSession.setActiveSession(session._jsparkSession)  # each thread has one
            self.run_here(*faults)

        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(run)
            yield running
            running.result()

    def refused_here(self, *faults: str) -> str:
        """The one sentence with which `run_here` ends."""
        with pytest.raises(UserError) as caught:
            self.run_here(*faults)
        return str(caught.value)

    def beside(self, name: str) -> "FaultRun":
        """The same recipe and output, with other files that processes see."""
        here = self.here / name
        here.mkdir()
        return replace(self, here=here)

    def run(self, *faults: str, conf: str = "", **environment: str) -> str:
        """Run it to its end, which must be a good one; return stdout."""
        with self.started(*faults, conf=conf, **environment) as driver:
            return self.ended(driver)

    def ended(self, driver: "subprocess.Popen[str]") -> str:
        said, _ = driver.communicate(timeout=500)
        assert driver.returncode == 0, self.errors()[-6000:]
        return said

    def refused(self, driver: "subprocess.Popen[str]") -> str:
        """The one sentence with which the driver ends."""
        driver.communicate(timeout=500)
        assert driver.returncode == 2, self.errors()[-6000:]
        assert "Traceback" not in self.errors()
        (said,) = (line for line in self.errors().splitlines() if line.startswith("error: "))
        return said.removeprefix("error: ")

    def errors(self) -> str:
        return (self.here / "stderr").read_text()

    @contextmanager
    def meeting(self, run: "subprocess.Popen[str] | Future[None] | None", where: str) -> Iterator[None]:
        """The block runs when a task has reached its meeting; then that goes on. run: None for this thread's."""
        deadline = time.monotonic() + 400
        try:
            while not (self.here / f"{where}-reached").exists():
                if isinstance(run, Future):
                    assert not run.done(), run.result()
                else:
                    assert run is None or run.poll() is None, self.errors()[-6000:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield
        finally:
            (self.here / f"{where}-go").touch()

    def happened(self) -> set[str]:
        return {path.name for path in self.here.iterdir() if re.fullmatch(r"\w+-\d+-\w+-\d+", path.name)}

    def digest(self) -> str:
        """Return the digest of the packs, which must be sound, with no file beside that does not belong to the run."""
        assert list(verify(self.out / PACKED)) == []
        found = {name for name, _ in self.out.files()}
        assert [name for name in found if not _FILES.fullmatch(name)] == []
        assert {name for name in found if name.endswith(".blob")} == self._blobs_in_use(found)
        return Manifest.load(self.out / PACKED).content_digest

    def _blobs_in_use(self, files: set[str]) -> set[str]:
        used = set()
        for name in files:
            if name.startswith("preprocess/chat/data/part-"):
                table = pq.read_table(pa.BufferReader(self.out.read(name)), columns=["images"])
                for images in table["images"].to_pylist():
                    used |= {image["blob"].removeprefix(f"{self.out.uri}/") for image in images or []}
        return used


def recipe_for(root: Folder, model: Path) -> Recipe:
    """The recipe of FaultRun from `root`/raw to `root`/out."""
    datasets = {"chat": RecipeDataset((root / "raw").uri, "messages", 0.7)}
    return Recipe((root / "out").uri, str(model), LENGTH, datasets, seed=3)


@contextmanager
def namenode_away(cluster: Cluster, seconds: float) -> Iterator[None]:
    """Stop the NameNode before the block, and start it `seconds` after the block."""
    cluster.stop("namenode")
    yield
    time.sleep(seconds)
    cluster.start("namenode")
