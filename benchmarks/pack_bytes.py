"""The pack stage on one core: bytes written a second beside a plain copy of the same bytes, and a worker's memory.

usage: python -m benchmarks.pack_bytes [FOLDER]     (needs 6 GB there; a temporary one if not given)
"""

import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil

from benchmarks.made import write_built
from pipeline.pack import Pack

LENGTH = 8192
SAMPLES = 1_000  # of a bucket, and at 1x: 130 MB of images
SCALES = {"1x": 1, "4x": 4, "16x": 16}


@dataclass(frozen=True)
class SmallBuckets(Pack):
    bucket_samples: ClassVar[int] = SAMPLES


@contextmanager
def worker_memory() -> Iterator[dict[str, int]]:
    """{"peak": bytes resident} of the largest Python worker of Spark below this process."""
    found, ended = {"peak": 0}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                try:
                    if any("pyspark" in part for part in process.cmdline()) and "java" not in process.name():
                        found["peak"] = max(found["peak"], process.memory_info().rss)
                except psutil.Error:
                    continue

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def copy_seconds(files: list[Path], target: Path) -> float:
    """A plain copy: read and write, 8 MiB at a time."""
    target.mkdir()
    started = time.perf_counter()
    for file in files:
        with file.open("rb") as source, (target / file.name).open("wb") as sink:
            shutil.copyfileobj(source, sink, 8 << 20)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def main(folder: Path) -> None:
    os.environ["SPARK_MASTER"] = "local[1]"
    write_built(folder / "warm", 10, LENGTH)  # starts Spark and its Python worker
    Pack.below(str(folder / "warm"), str(folder / "packed-warm"), LENGTH).run()
    print("| size | written | pack | plain copy | pack / copy (to reach: 60 %) | peak memory of a worker |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, scale in SCALES.items():
        built = folder / f"built-{name}"
        write_built(built, SAMPLES * scale, LENGTH)
        with worker_memory() as memory:
            job = SmallBuckets.below(str(built), str(folder / f"packed-{name}"), LENGTH)
            report = job.run()
        shards = sorted((folder / f"packed-{name}").rglob("shard-*.arrow"))
        written = sum(shard.stat().st_size for shard in shards) / 1e6
        packing = report.phases["shuffle, plan and write shards"]
        copying = min(copy_seconds(shards, folder / "copy") for _ in range(3))
        print(
            f"| {name} | {written:,.0f} MB | {written / packing:,.0f} MB/s | {written / copying:,.0f} MB/s "
            f"| {copying / packing:.0%} | {memory['peak'] / 1e6:,.0f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).absolute())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
