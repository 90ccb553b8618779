"""Reading packs from HDFS in one process: PackedDataset.read_batch over all, beside hdfs-native reading the same files.

HDFS is that of jobs/cluster.py on this machine, so its daemons share the cores with the reader.

usage: python -m benchmarks.read_hdfs
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hdfs_native import Client

from benchmarks.made import GRID, IMAGE_BYTES
from jobs.cluster import temporary_cluster
from kanyun.cli.parser import Parser
from kanyun.manifest import Counts
from kanyun.reader import PackedDataset
from kanyun.schema import Sample
from kanyun.storage import Folder
from kanyun.writer import ShardResult, ShardWriter, publish

LENGTH = 8192
SHARDS, PACKS, IMAGES = 4, 100, 10  # of a shard, of a pack: 520 MB in all
REPEATS = 5


def write_packs(folder: Folder) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 150_000, LENGTH // IMAGES, dtype=np.int32)
    results = []
    for index in range(SHARDS):
        with ShardWriter(folder, index, SHARDS, LENGTH, 0, ["made"]) as writer:
            for pack in range(PACKS):
                images = [rng.bytes(IMAGE_BYTES) for _ in range(IMAGES)]
                writer.add([Sample(pack, "made", 0, 0, ids, ids % 2 == 0, [GRID], [image]) for image in images])
        assert writer.result is not None
        results.append(ShardResult.from_row(writer.result.row()))
    samples = SHARDS * PACKS * IMAGES
    publish(
        folder, results, length=LENGTH, vision_budget=1 << 20, part=0, epoch=0, seed=0, ratios={}, tokenizer="",
        counts=Counts(samples, samples), packs_lower_bound=1, processor=None, pad_token_id=0, image_token_id=None,
    )  # fmt: skip


def read_packs(folder: Folder) -> int:
    """Bytes of the record batches, checksums verified and packs made."""
    dataset = PackedDataset(folder)
    packs = sum(len(dataset.read_batch(number)) for number in range(len(dataset)))
    assert packs == SHARDS * PACKS
    return sum(dataset.batch_bytes(number) for number in range(len(dataset)))


def read_whole(client: Client, paths: list[str]) -> int:
    size = 0
    for path in paths:
        reader = client.read(path)
        size += len(reader.read())
    return size


def main() -> None:
    with tempfile.TemporaryDirectory() as state, temporary_cluster(Path(state)) as cluster:
        folder = Folder(f"{cluster.hdfs}/packed")
        write_packs(folder)
        paths = [f"{folder.path}/{name}" for name in folder.names() if name.endswith(".arrow") and "shard" in name]
        client = Client(cluster.hdfs)
        ways: dict[str, Callable[[], int]] = {
            "packs, PackedDataset.read_batch": lambda: read_packs(folder),
            "files whole, hdfs-native": lambda: read_whole(client, paths),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        cpu = dict.fromkeys(ways, 0.0)
        for _ in range(REPEATS + 1):  # the first to warm up; in turn, so that a busy moment meets both
            for name, read in ways.items():
                started, used = time.perf_counter(), time.process_time()
                size = read()
                speeds[name].append(size / 1e6 / (time.perf_counter() - started))
                cpu[name] = time.process_time() - used
        floor = statistics.median(speeds["files whole, hdfs-native"][1:])
        print(f"| {size / 1e6:,.0f} MB from HDFS, one process | median of {REPEATS} | of the floor | CPU of the last |")
        print("|---|--:|--:|--:|")
        for name, measured in speeds.items():
            median = statistics.median(measured[1:])
            print(f"| {name} | {median:,.0f} MB/s | {median / floor:.0%} (to reach: 80 %) | {cpu[name]:.2f} s |")


if __name__ == "__main__":
    Parser(description=__doc__, example="python -m benchmarks.read_hdfs").parse_args()
    main()
