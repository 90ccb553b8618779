"""preprocess and filter on what people have: each format on each storage, hostile images, and edges."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyspark.sql import SparkSession

from kanyun.errors import UserError
from kanyun.storage import Folder
from pipeline.reports.report import Report
from pipeline.spark import spark_session
from pipeline.stages.filter import FilterStage
from pipeline.stages.preprocess import PreprocessStage
from tests.support.image_zoo import BAD, GOOD, HOSTILE

Rows = list[dict[str, Any]]


def picture(seed: int, quality: int = 95, width: int = 90, kind: str = "JPEG") -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(coarse).resize((width, width * 2 // 3), Image.Resampling.BICUBIC).save(data, kind, quality=quality)
    return data.getvalue()


def conversation(images: list[Any], answer: str = "A thing.") -> dict[str, Any]:
    turns = [{"role": "user", "content": "<image>" * len(images) + "What?"}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": images}


def jsonl(rows: Rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(folder: Folder) -> Rows:
    tables = [pq.read_table(io.BytesIO(folder.read(name))) for name in folder.names() if name.endswith(".parquet")]
    return sorted((r for t in tables for r in t.to_pylist()), key=lambda row: (row["file"], row["position"]))


def run(raw: Folder, dataset: str = "messages", near_duplicates: str = "keep") -> tuple[Rows, Rows, Report]:
    """Rows of data/ and of quarantine/, and the report of filter."""
    out = raw.parent
    PreprocessStage(raw.uri, (out / "checked").uri, dataset).run()
    report = FilterStage((out / "checked").uri, (out / "clean").uri, near_duplicates).run()
    return read(out / "clean" / "data"), read(out / "clean" / "quarantine"), report


# --- formats

PICTURES = [picture(n) for n in range(5)]
ROWS = [conversation([{"bytes": data, "path": None}], f"It is number {n}.") for n, data in enumerate(PICTURES)]
NAMED = [conversation([f"images/{n}.jpg"], f"It is number {n}.") for n in range(len(PICTURES))]


def table() -> pa.Table:
    return pa.Table.from_pylist(ROWS)


def parquet() -> bytes:
    data = io.BytesIO()
    pq.write_table(table(), data, row_group_size=2)
    return data.getvalue()


def arrow() -> bytes:
    data = io.BytesIO()
    with pa.ipc.new_stream(data, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)
    return data.getvalue()


def tar() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for number, (row, image) in enumerate(zip(NAMED, PICTURES)):
            fields = {"messages": row["messages"]}
            for name, content in ((f"{number:03}.jpg", image), (f"{number:03}.json", json.dumps(fields).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


FORMATS = {
    "a.jsonl": jsonl(NAMED),
    "a.jsonl.gz": gzip.compress(jsonl(NAMED)),
    "a.jsonl.zst": pa.compress(jsonl(NAMED), codec="zstd", asbytes=True),
    "a.jsonl.bz2": bz2.compress(jsonl(NAMED)),
    "a.jsonl.xz": lzma.compress(jsonl(NAMED)),
    "a.json": json.dumps(NAMED).encode(),
    "a.json.gz": gzip.compress(jsonl(NAMED)),
    "a.parquet": parquet(),
    "train/data-00000-of-00001.arrow": arrow(),
    "a.tar": tar(),
    "a.tar.gz": gzip.compress(tar()),
}


@pytest.fixture(params=["file", "hdfs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty place on each storage."""
    if request.param == "file":
        return Folder(str(tmp_path / "root"))
    return Folder(f"{request.getfixturevalue('cluster').hdfs}/{tmp_path.name}")


def test_every_format_gives_the_same_samples(root: Folder, spark: SparkSession) -> None:
    raw = root / "raw"
    for name, data in FORMATS.items():
        (raw / name.partition(".")[2].replace("/", "-")).write(name, data)
    for folder in raw.names():
        for number, image in enumerate(PICTURES):
            (raw / folder).write(f"images/{number}.jpg", image)
        (raw / folder).write("train/state.json", b"{}")
        (raw / folder).write("train/cache-0123.arrow", b"what datasets.map leaves behind")
    kept, quarantined, report = run(raw)
    assert report.reasons == {"duplicate": len(PICTURES) * (len(FORMATS) - 1)}
    rows = sorted(kept + quarantined, key=lambda row: (row["file"], row["position"]))
    assert len(rows) == len(FORMATS) * len(PICTURES)
    assert len({row["sample_id"] for row in rows}) == len(rows)
    for number, row in enumerate(rows):
        (image,) = row["images"]
        blob = Folder(image["blob"].rpartition("/")[0])
        assert blob.read(image["blob"].rpartition("/")[2], image["offset"], image["size"]) == PICTURES[number % 5]
        assert (image["width"], image["height"]) == (90, 60)


# --- images


def test_the_zoo_through_the_stages(spark: SparkSession, tmp_path: Path) -> None:
    """Also images that end their decoder's process in Spark's workers: those rows alone are lost to training."""
    raw = tmp_path / "raw"
    raw.mkdir()
    deeds = ["crash", "abort", "memory"]
    images = (
        GOOD | {name: data for name, (data, _) in BAD.items()} | {f"{d}.jpg": b"HOSTILE" + d.encode() for d in deeds}
    )
    for name, data in images.items():
        (raw / name).write_bytes(data)
    (raw / "rows.jsonl").write_bytes(jsonl([conversation([name], f"This is {name}") for name in images]))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HOSTILE)
    context = spark_session().sparkContext
    with patch.dict(context.environment, PYTHONPATH=str(tmp_path / "site")):  # of new workers of this context
        PreprocessStage(str(raw), str(tmp_path / "checked"), "messages").run()
    tracker = context.statusTracker()
    stages = {stage for job in tracker.getJobIdsForGroup() for stage in tracker.getJobInfo(job).stageIds}
    assert [info for stage in stages if (info := tracker.getStageInfo(stage)) and info.numFailedTasks] == []
    FilterStage(str(tmp_path / "checked"), str(tmp_path / "clean")).run()
    kept, quarantined = (read(Folder(str(tmp_path / "clean" / part))) for part in ("data", "quarantine"))
    assert [json.loads(row["raw"])["images"][0] for row in kept] == list(GOOD)
    expected = {name: reason for name, (_, reason) in BAD.items()} | {f"{d}.jpg": "processor_failed" for d in deeds}
    assert {json.loads(row["raw"])["images"][0]: row["reason"] for row in quarantined} == expected
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]


def test_images_that_look_alike(spark: SparkSession, tmp_path: Path) -> None:
    """One picture encoded three times and asked about twice, another one twice; an even one says nothing."""
    even = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(even, "PNG")
    images = {
        "a.jpg": picture(1), "b.jpg": picture(2), "c.jpg": picture(1, 60), "d.jpg": picture(2, 90, 200),
        "e.jpg": picture(1, 80, 120), "f.jpg": picture(3), "g.png": even.getvalue(), "h.jpg": picture(0, kind="PNG"),
        "i.png": even.getvalue() + b"more",
    }  # fmt: skip
    raw = tmp_path / "keep" / "raw"
    raw.mkdir(parents=True)
    for name, data in images.items():
        (raw / name).write_bytes(data)
    rows = [conversation([name], f"This is {name}") for name in images]
    rows += [conversation(["a.jpg"], "The same image, another answer"), conversation(["h.jpg", "c.jpg"], "Two of them")]
    (raw / "rows.jsonl").write_bytes(jsonl(rows))
    shutil.copytree(raw, tmp_path / "drop" / "raw")
    kept, quarantined, report = run(Folder(str(raw)))
    assert (len(kept), quarantined) == (len(rows), [])
    assert report.facts["rows with an image that looks like one of an earlier row"] == 4  # c, d, e, and the last row
    assert report.facts["such earlier rows"] == 2
    assert report.facts["images that look alike, 1"].startswith("rows.jsonl @ 0 and rows.jsonl @ ")
    kept, quarantined, report = run(Folder(str(tmp_path / "drop" / "raw")), near_duplicates="drop")
    assert [json.loads(row["raw"])["images"] for row in quarantined] == [
        ["c.jpg"], ["d.jpg"], ["e.jpg"], ["h.jpg", "c.jpg"]
    ]  # fmt: skip
    assert report.counts.quarantined == {"near_duplicate": 4}
    assert quarantined[0]["evidence"] == "an image that looks like one of rows.jsonl @ 0"
    assert report.facts["such earlier rows"] == 0
    assert "a.jpg" in kept[-1]["raw"]


# --- edges


def test_odd_rows_and_files_cost_themselves_alone(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values that neither Python nor Spark can hold, a file's name that is no UTF-8, files that are left out."""
    raw = tmp_path / "raw"
    raw.mkdir()
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
    text = json.dumps(turns)
    (raw / "surrogates.jsonl").write_text(
        f'{{"id": "\\ud83d", "messages": {text}}}\n{{"messages": {text.replace("This", chr(92) + "ud83d")}}}\n'
        f'{{"messages": {text.replace("What", "<image>")}, "images": ["\\ud83d.jpg"]}}\n'
        f'{{"deep": {"[" * 5_000}{"]" * 5_000}, "messages": {text}}}\n'
    )
    table = {"messages": [turns], "made": pa.array([0], pa.timestamp("us", tz="tzutc()"))}
    pq.write_table(pa.table(table), raw / "zone.parquet")
    Path(os.fsdecode(bytes(raw) + b"/\xff.jsonl")).write_text(json.dumps({"messages": turns, "tools": [{"name": "f"}]}))
    (raw / "notes.txt").write_text("no rows")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.json").write_text(
        json.dumps([{"messages": [*turns, turns[0], {**turns[1], "loss": False}]}])
    )
    (raw / "linked").symlink_to(tmp_path / "linked")
    kept, quarantined, _ = run(Folder(str(raw)))
    assert [row["file"] for row in kept] == ["\\udcff.jsonl", "linked/a.json", "surrogates.jsonl"]
    assert [(row["file"], row["reason"]) for row in quarantined] == [
        *[("surrogates.jsonl", "malformed_row")] * 3,
        ("zone.parquet", "duplicate"),
    ]
    assert json.loads(kept[0]["tools"]) == [{"name": "f"}]
    assert [message["loss"] for message in kept[1]["messages"]] == [None, None, None, False]
    assert f"preprocess: left out of {raw}: .txt: 1 (7 bytes)\n" in capsys.readouterr().out
    report = Report.load(Folder(str(tmp_path / "checked")), "preprocess")
    assert report.facts["left out: .txt"] == "1 (7 bytes)"


def test_ten_thousand_tiny_files(spark: SparkSession, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for number in range(10_000):
        folder = raw / f"{number % 100}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jsonl").write_text(f'{{"text": "document {number}"}}\n')
    kept, quarantined, _ = run(Folder(str(raw)), "text")
    assert (len(kept), len(quarantined)) == (10_000, 0)
    assert len({row["sample_id"] for row in kept}) == 10_000


def test_a_row_of_200_mb(spark: SparkSession, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    with open(raw / "a.jsonl", "wb") as stream:
        stream.write(b'{"text": "before"}\n{"text": "')
        for _ in range(200):
            stream.write(b"long " * 200_000)
        stream.write(b'"}\n{"text": "behind"}\n{"text": "\xff"}\n')
    kept, quarantined, _ = run(Folder(str(raw)), "text")
    assert [row["text"] for row in kept] == ["before", "behind"]
    assert [row["reason"] for row in quarantined] == ["row_too_large", "malformed_row"]


def test_every_row_bad(spark: SparkSession, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.jsonl").write_bytes(b"no JSON\n" * 50)
    kept, quarantined, report = run(Folder(str(raw)))
    assert (kept, len(quarantined)) == ([], 50)
    assert report.counts.quarantined == {"malformed_row": 50}


@pytest.mark.parametrize("files", [{}, {"a.jsonl": b""}, {"a.jsonl": b"\n\n"}, {"a.parquet": None}, {"a.txt": b"x"}])
def test_an_empty_dataset_is_told(files: dict[str, bytes | None], spark: SparkSession, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, data in files.items():
        if data is None:
            pq.write_table(pa.table({"text": pa.array([], pa.string())}), raw / name)
        else:
            (raw / name).write_bytes(data)
    with pytest.raises(UserError, match="has no rows"):
        PreprocessStage(str(raw), str(tmp_path / "out"), "text").run()
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_raw_folder_that_changes_after_preprocess(spark: SparkSession, tmp_path: Path) -> None:
    """Nothing behind preprocess reads it; preprocess itself refuses to take the old output for the new input's."""
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.jpg").write_bytes(picture(1))
    (raw / "a.jsonl").write_bytes(jsonl([conversation(["a.jpg"])]))
    PreprocessStage(str(raw), str(tmp_path / "checked"), "messages").run()
    (raw / "a.jpg").write_bytes(picture(2))
    with pytest.raises(UserError, match="input is"):
        PreprocessStage(str(raw), str(tmp_path / "checked"), "messages").run()
    shutil.rmtree(raw)
    FilterStage(str(tmp_path / "checked"), str(tmp_path / "clean")).run()
    (row,) = read(Folder(str(tmp_path / "clean" / "data")))
    (image,) = row["images"]
    blob = Path(image["blob"].removeprefix("file://")).read_bytes()
    assert blob[image["offset"] : image["offset"] + image["size"]] == picture(1)
