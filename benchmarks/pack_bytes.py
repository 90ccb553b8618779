"""The pack stage: bytes a second that a task writes, beside a plain copy of them; memory of a Python worker.

A task reads images from the blobs, plans, and writes a shard, as it does in Spark; the copy reads and writes the same
shard, 8 MiB at a time. Both go to the same file system, in turn, and end when their bytes are on disk (fsync).

usage: python -m benchmarks.pack_bytes [FOLDER]     (needs 5 GB there; a temporary one if not given)
"""

import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark import TaskContext

from benchmarks.made import write_built
from kanyun.cli.parser import Parser
from pipeline.schema import BUILT
from pipeline.spark import arrow_schema
from pipeline.stages.pack import PackStage
from pipeline.stages.shard import Job, write_shard

LENGTH = 8192
SAMPLES = 500  # at 1x: 65 MB of images
SCALES = {"1x": 1, "4x": 4, "16x": 16}
REPEATS = 3


@dataclass(frozen=True)
class SmallBuckets(PackStage):
    bucket_samples: ClassVar[int] = SAMPLES


@contextmanager
def worker_memory() -> Iterator[dict[str, int]]:
    """Yield {"peak": bytes resident} of the largest Python worker of Spark below this process."""
    memory, ended = {"peak": 0}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "pyspark.daemon" in process.cmdline():
                        memory["peak"] = max(memory["peak"], process.memory_info().rss)
                except psutil.Error:
                    continue

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


@dataclass(frozen=True)
class Cost:
    seconds: float  # until it is on disk
    cpu: float  # seconds


@contextmanager
def measured(costs: list[Cost], file: list[Path]) -> Iterator[None]:
    """Time a `with` block, and the fsync of the file that it adds to `file`."""
    started, used = time.perf_counter(), time.process_time()
    yield
    with file[-1].open("rb+") as stream:
        os.fsync(stream.fileno())
    costs.append(Cost(time.perf_counter() - started, time.process_time() - used))


def task_and_copy(built: Path, folder: Path) -> tuple[int, list[Cost], list[Cost]]:
    """Return (bytes of the shard, costs of the task, costs of the copy) of one bucket with all samples."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted((built / "data").glob("*.parquet"))])
    batches = table.cast(arrow_schema(BUILT)).to_batches()
    TaskContext._getOrCreate()._partitionId = 0  # as a worker has it
    tasks: list[Cost] = []
    copies: list[Cost] = []
    for number in range(REPEATS):
        target, shards, copied = folder / f"shard-{number}", [], [folder / f"copy-{number}"]
        with measured(tasks, shards):
            list(write_shard(iter(batches), Job(target.as_uri(), 1, LENGTH, 32_768, 0, 0)))
            shards += target.rglob("shard-*.arrow")
        with measured(copies, copied), shards[0].open("rb") as source, copied[0].open("wb") as sink:
            shutil.copyfileobj(source, sink, 8 << 20)
        size = copied[0].stat().st_size
        shutil.rmtree(target)
        copied[0].unlink()
    return size, tasks, copies


def main(folder: Path) -> None:
    os.environ["SPARK_MASTER"] = "local[1]"
    print(f"| the stage, buckets of {SAMPLES} | buckets | wall time | peak memory of a worker |\n|---|--:|--:|--:|")
    for name, scale in SCALES.items():
        built, packed = folder / f"built-{name}", folder / f"packed-{name}"
        write_built(built, SAMPLES * scale, LENGTH)
        with worker_memory() as memory:
            report = SmallBuckets.below(str(built), str(packed), LENGTH).run()
        shutil.rmtree(packed)
        print(
            f"| {name} | {report.facts['shards']} | {report.seconds:.1f} s | {memory['peak'] / 1e6:,.0f} MB |",
            flush=True,
        )
    print("\n| a task | written | pack | plain copy | pack / copy (to reach: 60 %) | CPU of pack | of the copy |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in SCALES:
        size, tasks, copies = task_and_copy(folder / f"built-{name}", folder)
        pack, copy = (statistics.median(cost.seconds for cost in costs) for costs in (tasks, copies))
        cpu = [f"{1e9 * min(cost.cpu for cost in costs) / size:.2f} s/GB" for costs in (tasks, copies)]
        speeds = f"{size / pack / 1e6:,.0f} MB/s | {size / copy / 1e6:,.0f} MB/s | {copy / pack:.0%}"
        print(f"| {name} | {size / 1e6:,.0f} MB | {speeds} | {' | '.join(cpu)} |", flush=True)


if __name__ == "__main__":
    parser = Parser(description=__doc__, example="python -m benchmarks.pack_bytes /local/disk")
    parser.add_argument("folder", type=Path, nargs="?")
    if folder := parser.parse_args().folder:
        main(folder.absolute())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
