"""Data on HDFS that is damaged, changes, or is not there: found where it is read, never passed on."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from jobs.cluster import Cluster
from kanyun.errors import UserError
from kanyun.manifest import Manifest
from kanyun.storage import Folder
from kanyun.transfer import copy_folder
from kanyun.verify import verify
from pipeline.recipe import RATIOS, Recipe
from pipeline.reports.report import Report, RowCounts
from pipeline.stages.build import BuildStage
from pipeline.stages.filter import FilterStage
from pipeline.stages.pack import PackStage
from pipeline.stages.preprocess import PreprocessStage
from pipeline.stages.sample import SampleStage
from tests.support.fault_runs import LENGTH, OUTPUTS, PACKED, FaultRun, recipe_for


@contextmanager
def flipped(folder: Folder, name: str, position: int) -> Iterator[None]:
    """One bit of a file is another one in the block."""
    before = folder.read(name)
    folder.write(name, before[:position] + bytes([before[position] ^ 1]) + before[position + 1 :])
    try:
        yield
    finally:
        folder.write(name, before)


def rows_of(folder: Folder) -> list[dict[str, Any]]:
    """Return the rows of a folder of parquet files."""
    names = (name for name in folder.names() if name.startswith("part-"))
    return [row for name in names for row in pq.read_table(pa.BufferReader(folder.read(name))).to_pylist()]


def first(folder: Folder, prefix: str) -> str:
    return next(name for name, size in folder.files() if name.startswith(prefix) and size)


def in_a_page(folder: Folder, name: str, column: str) -> int:
    """A position inside the compressed values of a column."""
    group = pq.ParquetFile(pa.BufferReader(folder.read(name))).metadata.row_group(0)
    chunk = next(c for n in range(group.num_columns) if (c := group.column(n)).path_in_schema.startswith(column))
    return int(chunk.data_page_offset + chunk.total_compressed_size * 2 // 3)


@pytest.mark.parametrize("kind", ["manifest.json", "batches.arrow", "shard-", "lineage/"])
def test_any_byte_of_a_packed_dataset(on_hdfs: tuple[Recipe, Folder], kind: str) -> None:
    packed = on_hdfs[1] / PACKED
    name = first(packed, kind)
    assert list(verify(packed)) == []
    size = packed.size(name)
    for position in (0, size // 2, size - 2):  # header, content, footer
        with flipped(packed, name, position):
            try:
                faults = list(verify(packed))
            except UserError as error:
                faults = [str(error)]
            assert faults, position
            assert name in faults[0]
    assert list(verify(packed)) == []


def test_a_byte_of_a_blob(on_hdfs: tuple[Recipe, Folder]) -> None:
    _, out = on_hdfs
    image = next(image for row in rows_of(out / "build/data") for image in row["images"])  # of a sample that was chosen
    blobs, name = out / "preprocess/chat/blobs", image["blob"].rsplit("/", 1)[1]
    with (
        flipped(blobs, name, image["offset"] + image["size"] // 2),
        pytest.raises(
            UserError, match=rf"{name} was changed after preprocess \(the image of \d+ bytes at byte \d+ does not have"
        ),
    ):
        PackStage.below((out / "build").uri, (out / "again").uri, LENGTH).run()
    assert (out / "again").names() == []


@pytest.mark.parametrize(("stage", "column"), [("preprocess/chat", "raw"), ("build", "input_ids")])
def test_a_byte_of_a_stage_s_rows(on_hdfs: tuple[Recipe, Folder], stage: str, column: str) -> None:
    _, out = on_hdfs
    rows = out / stage / "data"
    name = first(rows, "part-")
    with flipped(rows, name, in_a_page(rows, name, column)), pytest.raises(UserError, match="CRC checksum"):
        if stage == "build":
            PackStage.below((out / "build").uri, (out / "again").uri, LENGTH).run()
        else:
            FilterStage((out / stage).uri, (out / "again").uri).run()
    assert not [name for name in out.names() if "again" in name and (out / name).files()]


@pytest.mark.parametrize("stage", OUTPUTS)
def test_any_byte_of_a_report(on_hdfs: tuple[Recipe, Folder], stage: str) -> None:
    recipe, out = on_hdfs
    report = (out / stage).read("report.json")
    for position in (report.index(b'"rows_in"') + 11, report.index(b'"settings"') + 3, len(report) // 2):
        with (
            flipped(out / stage, "report.json", position),
            pytest.raises(UserError, match=rf"{stage}/report.json is damaged"),
        ):
            recipe.run(overwrite=False)
    recipe.run(overwrite=False)


def test_a_raw_folder_that_changes_between_stages(on_hdfs: tuple[Recipe, Folder], undisturbed: FaultRun) -> None:
    """Later stages do not read it; preprocess says that its output is of something else."""
    _, out = on_hdfs
    root = out.parent / "changed"
    at = {name: (root / "out" / name).uri for name in ("preprocess", "filter", "sample", "build", "packed")}
    copy_folder(Folder(undisturbed.raw), root / "raw", "put")
    PreprocessStage((root / "raw").uri, f"{at['preprocess']}/chat", "messages").run()
    FilterStage(f"{at['preprocess']}/chat", f"{at['filter']}/chat").run()
    for name, _ in (root / "raw").files():
        (root / "raw").write(name, b"{}")
    with pytest.raises(UserError, match="holds the output of other work: input is"):
        recipe_for(root, undisturbed.model).run(overwrite=False)
    (root / "out").write(RATIOS, b"chat: 0.7")
    SampleStage(at["filter"], at["sample"], seed=3, ratios=(root / "out" / RATIOS).uri).run()
    BuildStage(at["sample"], at["build"], str(undisturbed.model), LENGTH).run()
    PackStage.below(at["build"], at["packed"], LENGTH).run()
    wanted = Manifest.load(out / PACKED)
    assert Manifest.load(root / "out" / PACKED).content_digest == wanted.content_digest


def test_no_rows_at_all(cluster: Cluster, undisturbed: FaultRun, spark: SparkSession, tmp_path: Path) -> None:
    root = Folder(f"{cluster.hdfs}/{tmp_path.name}")
    for content, says in ((None, "does not exist"), (b"", "has no rows"), (b"\n \n\n", "has no rows")):
        if content is not None:
            (root / "raw").write("a.jsonl", content)
        with pytest.raises(UserError, match=says):
            recipe_for(root, undisturbed.model).run(overwrite=False)
        assert (root / "out/preprocess").names() == []


def test_every_row_is_bad(cluster: Cluster, undisturbed: FaultRun, spark: SparkSession, tmp_path: Path) -> None:
    root = Folder(f"{cluster.hdfs}/{tmp_path.name}")
    (root / "raw").write("a.jsonl", b"{}\n[]\n{\nnull\n")
    with pytest.raises(UserError, match=r"build has no samples: all rows were quarantined or dropped"):
        recipe_for(root, undisturbed.model).run(overwrite=False)
    out = root / "out"
    bad = rows_of(out / "filter/chat/quarantine")
    assert {row["raw"]: row["reason"] for row in bad} == dict.fromkeys(("{}", "[]", "{", "null"), "malformed_row")
    counts = {name: Report.load(out / name, name.split("/")[0]).counts for name in OUTPUTS[:-1]}
    assert counts["preprocess/chat"] == RowCounts(4, 4)
    assert counts["filter/chat"] == RowCounts(4, 0, quarantined={"malformed_row": 4})
    assert counts["sample"] == counts["build"] == RowCounts(0, 0)
    assert (out / "packed").names() == []


def test_what_another_user_may_not_read(
    cluster: Cluster, undisturbed: FaultRun, spark: SparkSession, tmp_path: Path
) -> None:
    """An image costs its rows, a file of rows stops the stage. Another user, since root may read everything."""
    root = Folder(f"{cluster.hdfs}/{tmp_path.name}")
    for name in ("raw", "hidden"):
        copy_folder(Folder(undisturbed.raw), root / name, "put")
    cluster.shell("-chmod", "600", f"{root.path}/raw/images/3.png", f"{root.path}/hidden/part-1.jsonl")
    cluster.shell("-chmod", "777", root.path)
    lines = [
        json.dumps(["preprocess", (root / name).uri, (root / f"{name}-out").uri, "--dataset", "messages"])
        for name in ("raw", "hidden")
    ]
    env = os.environ | cluster.env | {"HADOOP_USER_NAME": "somebody", "SPARK_MASTER": "local[2]"}
    command = [sys.executable, "-m", "tests.support.commands", *lines]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    images, file = done.stdout.splitlines()[-2:]
    assert images == ""
    assert "Permission denied: user=somebody, access=READ" in file
    assert (root / "hidden-out").files() == []
    assert not [name for name in root.names() if name.startswith("_")], "no attempt is left"
    rows = rows_of(root / "raw-out/data")
    named = {"images/3.png": "image_unreadable", "images/none.png": "image_missing"}
    for row in rows:
        images = json.loads(row["raw"])["images"]
        assert row["reason"] == (named.get(images[0]) if images else None)
        refused = "'images/3.png' may not be read: " in (row["evidence"] or "")
        assert refused == (images == ["images/3.png"])
        assert refused == ("Permission denied: user=somebody" in (row["evidence"] or ""))
    assert len(rows) == 120
    assert "images/3.png" in {image for row in rows for image in json.loads(row["raw"])["images"]}
