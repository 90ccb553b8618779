"""Hadoop without a distribution: pyspark's own jars, and one more with the daemons from Maven Central."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pyspark

from kanyun.errors import UserError

CACHE = Path(os.environ.get("KANYUN_CACHE") or Path.home() / ".cache" / "kanyun")
SPARK_HOME = Path(pyspark.__file__).parent
HEAP = "256m"  # of each daemon
# A quick start rather than a quick hundredth hour.
JAVA_OPTIONS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
# What HDFS needs of pyspark's 280 jars.
_JARS = ("hadoop-client-*", "slf4j-api-*", "log4j-*", "jcl-over-slf4j-*", "metrics-core-*", "jackson-*", "zstd-jni-*")
_LOG4J = """rootLogger.level = info
rootLogger.appenderRef.stderr.ref = stderr
appender.stderr.type = Console
appender.stderr.name = stderr
appender.stderr.target = SYSTEM_ERR
appender.stderr.layout.type = PatternLayout
appender.stderr.layout.pattern = %d %p %c{1}: %m%n
"""


def minicluster_jar() -> Path:
    """The daemons, in the version of pyspark's Hadoop client: fetched once, by Maven, into CACHE.

    Raises UserError if Maven is missing and cannot be installed, or the download fails.
    """
    client = next((SPARK_HOME / "jars").glob("hadoop-client-api-*.jar"))
    jar = CACHE / client.name.replace("client-api", "client-minicluster")
    if not jar.exists():
        if shutil.which("mvn") is None:
            if os.geteuid() != 0 or shutil.which("apt-get") is None:
                raise UserError(f"Maven is missing, which fetches {jar.name}: install it (apt-get install maven)")
            for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "maven"]):
                run(command, "Maven could not be installed")
        CACHE.mkdir(parents=True, exist_ok=True)
        artifact = f"org.apache.hadoop:hadoop-client-minicluster:{jar.stem.rpartition('-')[2]}"
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = ["mvn", "-q", "-B", "dependency:copy", f"-Dartifact={artifact}", f"-DoutputDirectory={folder}"]
            run(command, f"Maven could not fetch {artifact}")
            os.replace(Path(folder, jar.name), jar)
    return jar


def hadoop_command(conf: Path, tmp: Path, main: str, *args: str) -> list[str]:
    """The command line of a Hadoop class, with its conf folder first on the class path, and its temporary files below
    `tmp` (a NameNode's web pages, for one, which stay there)."""
    java = shutil.which("java", path=f"{os.environ['JAVA_HOME']}/bin" if "JAVA_HOME" in os.environ else None)
    if java is None:
        raise UserError("Java is missing: install Java 17 or 21 (Debian: apt-get install default-jre-headless)")
    jars = [str(path) for pattern in _JARS for path in (SPARK_HOME / "jars").glob(f"{pattern}.jar")]
    classes = ":".join([f"{conf}/", str(minicluster_jar()), *jars])
    return [
        java,
        f"-Xmx{HEAP}",
        *JAVA_OPTIONS,
        f"-Djava.io.tmpdir={tmp}",
        "-cp",
        classes,
        f"org.apache.hadoop.{main}",
        *args,
    ]


def write_conf(folder: Path, core: dict[str, Any], hdfs: dict[str, Any]) -> None:
    """A Hadoop conf folder: core-site.xml, hdfs-site.xml, and a log on stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("core-site.xml", core), ("hdfs-site.xml", hdfs)):
        rows = [f"<property><name>{k}</name><value>{v}</value></property>" for k, v in values.items()]
        (folder / name).write_text("\n".join(["<configuration>", *rows, "</configuration>\n"]))
    (folder / "log4j2.properties").write_text(_LOG4J)


def run(command: list[str], failure: str) -> str:
    """Run a command; return its stdout. Raises UserError, with the end of its output, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise UserError(f"{failure}: {(done.stdout + done.stderr).strip()[-2000:]}")
    return done.stdout
