"""python -m pipeline doctor: whether this machine, its Spark and its storages can run the stages."""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from kanyun.cli import doctor
from kanyun.cli.doctor import Finding, missing, ok
from kanyun.errors import UserError

# What pip brings for `extra="pipeline"`: tests/unit/test_commands.py compares.
_PACKAGES = ("pyspark", "pandas", "pillow", "jinja2", "pyyaml", "venv-pack")


def findings(folders: Sequence[str]) -> Iterator[Finding]:
    """Yield what was looked at; `folders` are read, on disk or HDFS. Spark is started if what it needs is there."""
    needed = [doctor.python(), doctor.java(), _packages()]
    yield from needed
    yield doctor.disk("disk for shuffles", os.environ.get("SPARK_LOCAL_DIRS", tempfile.gettempdir()).split(",")[0])
    yield doctor.hadoop_conf()
    for folder in folders:
        yield doctor.reachable(folder)
    if all(finding.state == "ok" for finding in needed):
        yield _spark()


def _packages() -> Finding:
    finding = doctor.packages(_PACKAGES, extra="pipeline")
    if finding.state == "ok" and int(version("pandas").split(".")[0]) >= 3:
        return missing("packages", f"pandas is {version('pandas')}, pyspark needs one below 3: pip install 'pandas<3'")
    return finding


def _spark() -> Finding:
    """One task on the master that stages would use, through Arrow and a Python worker."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    from pipeline.spark import plain_errors, spark_session

    master = os.environ.get("SPARK_MASTER", "local[*]")
    started = time.monotonic()
    try:
        with plain_errors():
            session = spark_session()
            rows = session.range(1).mapInArrow(lambda batches: batches, "id long").count()
    except (UserError, PySparkException, Py4JError, RuntimeError) as error:
        return missing("Spark", f"{master} ran no task ({str(error).strip().splitlines()[0]}): see the lines above")
    seconds = time.monotonic() - started
    return ok("Spark", f"{session.version} on {session.sparkContext.master}: {rows} task in {seconds:.0f} s")
