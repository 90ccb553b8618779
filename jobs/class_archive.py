"""Make the archive of Spark's classes that JVMs start from: python -m jobs.class_archive, which jobs/setup.sh calls.

Reading and verifying 15,000 classes is a third of what a small stage costs. Java writes what a JVM has loaded when it
ends (class data sharing), here after two stages over a few rows: a minute, and 190 MB.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from pyspark import SparkContext

from kanyun.cli.parser import Parser
from kanyun.errors import run_cli
from pipeline.spark import CLASS_ARCHIVE, spark_session
from pipeline.stages.filter import FilterStage
from pipeline.stages.preprocess import PreprocessStage

_PATIENCE = 300  # seconds for a JVM that ends to write it: 20 on an idle core


def main() -> None:
    prog = "python -m jobs.class_archive"
    Parser(prog=prog, description="Make the archive of Spark's classes.", example=prog).parse_args()
    print(f"making {CLASS_ARCHIVE}: Spark's Java classes, for quicker starts", file=sys.stderr, flush=True)
    CLASS_ARCHIVE.unlink(missing_ok=True)
    part = CLASS_ARCHIVE.with_suffix(".part")
    os.environ |= {
        "SPARK_MASTER": "local[1]",
        "SPARK_SUBMIT_OPTS": f"-XX:ArchiveClassesAtExit={part} -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xlog:disable",
    }
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        raw, preprocessed, filtered = (Path(folder, name) for name in ("raw", "preprocessed", "filtered"))
        raw.mkdir()
        (raw / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"Row {i}. " * 20}) for i in range(10)))
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            PreprocessStage(str(raw), str(preprocessed), "text").run()
            FilterStage(str(preprocessed), str(filtered)).run()
    java = SparkContext._gateway
    spark_session().stop()
    java.shutdown()
    java.proc.stdin.close()
    try:
        failed = java.proc.wait(_PATIENCE) != 0
    except subprocess.TimeoutExpired:
        java.proc.kill()
        failed = True
    if failed or not part.exists():
        print("Java made no archive: Spark starts as it does without one", file=sys.stderr)
        part.unlink(missing_ok=True)
    else:
        part.replace(CLASS_ARCHIVE)


if __name__ == "__main__":
    run_cli(main)
