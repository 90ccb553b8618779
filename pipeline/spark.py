"""The Spark session of all stages, reading and mapping of rows, progress, and errors in one sentence."""

import atexit
import locale
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from py4j.protocol import Py4JJavaError, Py4JNetworkError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema
from pyspark.sql.types import StructType

from kanyun.cli.progress import Progress
from kanyun.errors import UnavailableError, UserError
from kanyun.storage import Folder
from kanyun.storage.retries import first_line
from kanyun.storage.waits import scaled

_HERE = Path(__file__).absolute().parent  # in an executor it is a relative path, into the archive of our code
# Rows that go to and from Python workers in one batch, and in Spark's cache: 10,000 long rows, its default, are GBs.
BATCH_ROWS = 256
# Spark tries a failed task at once, four times in all: too soon where a DataNode died and is not missed yet, so that
# blocks are still given to it.
RETRY_SECONDS = scaled(20)
_UTF8 = {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}  # environment of Java and of Python's workers
# Of a parquet row group, which is the least that a task reads. Spark's own are 128 MB: one task's work of minutes.
ROW_GROUP_ROWS = 2_000
_SETTINGS = {
    **{f"spark.executorEnv.{name}": value for name, value in _UTF8.items()},
    "spark.sql.execution.arrow.maxRecordsPerBatch": str(BATCH_ROWS),
    "spark.sql.inMemoryColumnarStorage.batchSize": str(BATCH_ROWS),
    "spark.sql.parquet.compression.codec": "zstd",
    "spark.hadoop.parquet.block.row.count.limit": str(ROW_GROUP_ROWS),
    "spark.sql.session.timeZone": "UTC",
    "spark.ui.showConsoleProgress": "false",
    # Off, Hadoop's client gives up a NameNode that has been away for 10 s. On, it retries for minutes, and for half a
    # minute where one is in safe mode, which ends by itself after a start.
    "spark.hadoop.dfs.client.retry.policy.enabled": "true",
    "spark.hadoop.dfs.client.retry.policy.spec": f"{round(scaled(3000))},10",
    # Pages are written with a checksum, which is not verified by default.
    "spark.hadoop.parquet.page.verify-checksum.enabled": "true",
}
# For a session that spark-submit did not configure.
_LOCAL_SETTINGS = {
    "spark.ui.enabled": "false",
    "spark.driver.memory": "2g",  # in local mode this is the memory of all tasks
    "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={(_HERE / 'log4j2.properties').as_uri()}",
}
_INCUBATOR_WARNING = b"WARNING: Using incubator modules"
# A UserError of a task in the text of Spark's error; and the errors of Hadoop's client in Java.
_USER_ERROR = re.compile(r"^kanyun\.[\w.]+Error: (.+)$", re.MULTILINE)
_STORAGE_ERROR = re.compile(
    r"(?:QuotaExceededException|AccessControlException|SafeModeException|ChecksumException|ConnectException"
    r"|FileSystemException|ParquetDecodingException)\)?: ([^\n]+)"
)


def spark_session() -> SparkSession:
    """Return the running session, or start one: on spark-submit's master, else SPARK_MASTER's, else local[*]."""
    running = SparkSession.getActiveSession()
    if running is not None:
        return running
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # the workers' Python is the driver's
    if locale.getencoding().lower() != "utf-8":  # a container without LANG: Java could not name a file in Chinese
        os.environ |= _UTF8
    builder = SparkSession.builder.appName("kanyun")
    settings = dict(_SETTINGS)
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # spark-submit sets it
        master = os.environ.get("SPARK_MASTER", "local[*]")
        builder = builder.master(master)
        settings |= _LOCAL_SETTINGS
        if master.startswith("local"):  # the name of a laptop or of a container may lead nowhere
            settings["spark.driver.host"] = "127.0.0.1"
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")  # else the JVM looks the name up, and ends
    if user := os.environ.get("HADOOP_USER_NAME"):  # JVMs pass it on, Python workers read it
        settings["spark.executorEnv.HADOOP_USER_NAME"] = user
    for key, value in settings.items():
        builder = builder.config(key, value)
    with incubator_warning_dropped():
        session = builder.getOrCreate()
    _end_quietly()
    # On a cluster Spark's log says how the job waits for its place; then people see our progress, and lost executors.
    if not session.sparkContext.getConf().contains("spark.log.level") and "PYSPARK_GATEWAY_PORT" in os.environ:
        session.sparkContext.setLogLevel("ERROR")
    _ship_code(session)
    return session


def _end_quietly() -> None:
    """Let Ctrl-C, and a JVM that dies, end the stage by an exception alone.

    pyspark's handler of Ctrl-C calls Java from within a call of Java, and py4j prints the stack of calls that fail.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.getLogger().addFilter(_is_no_stack_of_py4j)


def _is_no_stack_of_py4j(record: logging.LogRecord) -> bool:
    return "while sending command" not in str(record.msg)


@contextmanager
def incubator_warning_dropped() -> Iterator[None]:
    """Let a JVM that is started in the `with` block print all but one line.

    Spark adds a module that Java warns of, with no option to stop it: else it is the first line of every stage. The JVM
    inherits a pipe as its stderr, whose lines a thread copies.
    """
    read_end, write_end = os.pipe()
    stderr = os.dup(2)
    os.dup2(write_end, 2)
    os.close(write_end)

    def copy() -> None:
        with os.fdopen(read_end, "rb") as lines:
            for line in lines:
                if not line.startswith(_INCUBATOR_WARNING):
                    os.write(stderr, line)

    threading.Thread(target=copy, name="stderr of the JVM", daemon=True).start()
    try:
        yield
    finally:
        os.dup2(stderr, 2)


def spark_schema(schema: pa.Schema) -> StructType:
    return from_arrow_schema(schema)


def read_parquet(folder: Folder, schema: pa.Schema | None = None) -> DataFrame:
    """Return the rows of a folder of parquet files; without `schema`, with the columns of the files."""
    # Else Spark takes the path for a glob, and a folder may be named `run:1 [a]`: with a colon no escape would help.
    reader = spark_session().read.option("__globPaths__", "false")
    if schema is not None:
        reader = reader.schema(spark_schema(schema))
    return reader.parquet(folder.uri)


def arrow_schema(schema: pa.Schema) -> pa.Schema:
    """Return `schema` with the Arrow types that Spark takes from Python: no fixed-size lists, no fixed-size binary."""
    return to_arrow_schema(from_arrow_schema(schema))


def map_rows(
    rows: DataFrame, function: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]], schema: pa.Schema
) -> DataFrame:
    """Map the rows with `function`, which takes a task's batches (at most BATCH_ROWS rows each) and yields others."""
    output = arrow_schema(schema)

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        try:
            for batch in function(batches):
                yield batch if batch.schema.equals(output) else batch.cast(output)
        except UnavailableError:
            time.sleep(RETRY_SECONDS)
            raise

    return rows.mapInArrow(run, spark_schema(schema))


class SparkProgress(Progress):
    """The progress over the tasks that a session runs in the `with` block; more of them come with each of its jobs."""

    def __init__(self, session: SparkSession, title: str):
        super().__init__(title, 0, "tasks")
        self._tracker = session.sparkContext.statusTracker()
        self._tasks: dict[int, tuple[int, int]] = {}  # Spark stage -> (tasks done, tasks)

    def update(self) -> None:
        running = set(self._tracker.getActiveStageIds())
        for stage in running:
            if info := self._tracker.getStageInfo(stage):
                self._tasks[stage] = (info.numCompletedTasks, info.numTasks)
        self.done = sum(done if stage in running else total for stage, (done, total) in self._tasks.items())
        self.total = sum(total for _, total in self._tasks.values())


@contextmanager
def plain_errors() -> Iterator[None]:
    """Re-raise failures of workers and of the storage as UserError; other errors stay."""
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        if messages := _USER_ERROR.findall(str(error)):
            raise UserError(messages[-1]) from error
        if message := _STORAGE_ERROR.search(str(error)):
            raise UserError(f"Spark cannot use the storage ({message[1]}): mend that, and run it again") from error
        raise
    except (Py4JNetworkError, ConnectionError) as error:  # those of a storage are UserErrors by now
        raise UserError(
            f"Spark's JVM has ended ({first_line(error)}), perhaps killed for its memory (see dmesg): run it again"
        ) from error


def _ship_code(session: SparkSession) -> None:
    """Send this code to the executors, which need not have it installed."""
    folder = tempfile.mkdtemp(prefix="kanyun-code-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # until then Spark compares its copies with it
    path = Path(folder, "kanyun_code.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for package in ("pipeline", "kanyun"):
            for module in sorted((_HERE.parent / package).rglob("*.py")):
                archive.write(module, module.relative_to(_HERE.parent))
    session.sparkContext.addPyFile(str(path))
