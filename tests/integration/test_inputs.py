"""preprocess and filter on what people have: each format on each storage, and edges."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from kanyun.errors import UserError
from kanyun.storage import Folder
from pipeline.reports.report import Report
from pipeline.stages.filter import FilterStage
from pipeline.stages.preprocess import PreprocessStage
from tests.support.raw_inputs import conversation, jsonl, picture, read, run

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
