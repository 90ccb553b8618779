"""The Spark session that all stages share, its progress bar, and Arrow schemas as Spark takes them."""

import atexit
import os
import shutil
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema
from pyspark.sql.types import StructType
from tqdm import tqdm

_HERE = Path(__file__).parent
# Rows to and from Python workers at a time, and in Spark's cache: 10,000 long rows, Spark's default, take gigabytes.
BATCH_ROWS = 256
_SETTINGS = {
    "spark.sql.execution.arrow.maxRecordsPerBatch": str(BATCH_ROWS),
    "spark.sql.inMemoryColumnarStorage.batchSize": str(BATCH_ROWS),
    "spark.sql.parquet.compression.codec": "zstd",
    "spark.sql.session.timeZone": "UTC",
    "spark.ui.showConsoleProgress": "false",
}
# For a session that spark-submit did not configure.
_LOCAL_SETTINGS = {
    "spark.ui.enabled": "false",
    "spark.driver.memory": "2g",  # in local mode this is the memory of all tasks
    "spark.driver.host": "127.0.0.1",
    "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={(_HERE / 'log4j2.properties').as_uri()}",
}


def spark_session() -> SparkSession:
    """The running session, or a new one: on spark-submit's master, else SPARK_MASTER's, else local[*]."""
    running = SparkSession.getActiveSession()
    if running is not None:
        return running
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # the workers' Python is the driver's
    builder = SparkSession.builder.appName("kanyun")
    settings = dict(_SETTINGS)
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # spark-submit sets it
        builder = builder.master(os.environ.get("SPARK_MASTER", "local[*]"))
        settings |= _LOCAL_SETTINGS
    for key, value in settings.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    _ship_code(session)
    return session


def spark_schema(schema: pa.Schema) -> StructType:
    return from_arrow_schema(schema)


def arrow_schema(schema: pa.Schema) -> pa.Schema:
    """`schema` with the Arrow types that Spark takes from Python: no fixed-size lists, no fixed-size binary."""
    return to_arrow_schema(from_arrow_schema(schema))


def map_rows(
    rows: DataFrame, function: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]], schema: pa.Schema
) -> DataFrame:
    """mapInArrow with our schemas: `function` gets a task's batches (at most BATCH_ROWS rows each) and gives others."""
    wanted = arrow_schema(schema)

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in function(batches):
            yield batch if batch.schema.equals(wanted) else batch.cast(wanted)

    return rows.mapInArrow(run, spark_schema(schema))


@contextmanager
def progress(session: SparkSession, title: str) -> Iterator[None]:
    """A bar on stderr over the tasks that run in the `with` block."""
    tracker = session.sparkContext.statusTracker()
    ended = threading.Event()
    tasks: dict[int, tuple[int, int]] = {}  # Spark stage -> (tasks done, tasks)

    def watch(bar: tqdm) -> None:
        while not ended.wait(0.5):
            for stage in tracker.getActiveStageIds():
                if info := tracker.getStageInfo(stage):
                    tasks[stage] = (info.numCompletedTasks, info.numTasks)
            running = set(tracker.getActiveStageIds())
            done = sum(count if stage in running else total for stage, (count, total) in tasks.items())
            bar.total = sum(total for _, total in tasks.values())
            bar.update(done - bar.n)

    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(desc=title, unit=" tasks", mininterval=interval, maxinterval=interval, leave=False) as bar:
        thread = threading.Thread(target=watch, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _ship_code(session: SparkSession) -> None:
    """Give the executors this code: they need not have it installed."""
    folder = tempfile.mkdtemp(prefix="kanyun-code-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # until then Spark compares its copies with it
    path = Path(folder, "kanyun_code.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for package in ("pipeline", "kanyun"):
            for module in sorted((_HERE.parent / package).rglob("*.py")):
                archive.write(module, module.relative_to(_HERE.parent))
    session.sparkContext.addPyFile(str(path))
