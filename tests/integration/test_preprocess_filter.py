"""preprocess and filter on real Spark: every planted bad row under its reason, in each of the three formats."""

import base64
import io
import json
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin
from pyspark.sql import SparkSession

from kanyun.storage import Folder
from pipeline.reports.report import Histogram, Report
from pipeline.spark import spark_session
from pipeline.stages.filter import FilterStage
from pipeline.stages.preprocess import PreprocessStage
from tests.support.raw_rows import lines, write_lines

Rows = list[dict[str, Any]]


# name -> (picture, reason)
PICTURES = {
    "small": "image_too_small",
    "narrow": "image_aspect_ratio",
    "truncated": "image_unreadable",
    "wordy": "processor_failed",
    "bomb": "image_too_large",
    "../../outside": "image_path_escapes",
    "gone": "image_missing",
}


class TinyTasks(PreprocessStage):
    task_bytes: ClassVar[tuple[int, int]] = (700, 700)


def picture(width: int, height: int, seed: int, **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", **options)
    return data.getvalue()


def write_pictures(folder: Path) -> None:
    """Write pictures, of which 0.png to 9.png are good; 10.png has the bytes of 0.png."""
    folder.mkdir(parents=True)
    for number in range(11):
        (folder / f"{number}.png").write_bytes(picture(40 + number % 10, 50, seed=number % 10))
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Comment", "x" * (2 << 20), zip=True)
    (folder / "small.png").write_bytes(picture(20, 50, 0))
    (folder / "narrow.png").write_bytes(picture(28, 5700, 0))
    (folder / "truncated.png").write_bytes(picture(64, 64, 0)[:4000])
    (folder / "wordy.png").write_bytes(picture(64, 64, 0, pnginfo=comment))
    header = bytearray(picture(64, 64, 0))
    header[16:24] = (30_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(header)
    (folder.parent.parent / "outside.png").write_bytes(picture(64, 64, 0))


def conversation(image: str | None, question: str = "<image>\nWhat?", answer: str = "A thing.") -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns} | ({"images": [f"{image}.png"]} if image is not None else {})


def as_llava(row: dict[str, Any]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in row["messages"]]
    return {"conversations": turns} | ({"image": row["images"][0]} if "images" in row else {})


def bad_conversations() -> list[tuple[str, dict[str, Any]]]:
    bad = [(reason, conversation(name)) for name, reason in PICTURES.items()]
    return [
        *bad,
        ("image_count_mismatch", conversation("1", "<image><image> What?")),
        ("image_count_mismatch", conversation(None, "<image> What?")),
        ("text_too_short", conversation("2", "What is all this? <image>", " a ")),
        ("malformed_row", {"messages": []}),
        ("malformed_row", {"other": 1}),
    ]


def read(folder: Path) -> Rows:
    return sorted(pq.read_table(folder).to_pylist(), key=lambda row: (row["file"], row["position"]))


def content(rows: Rows) -> Rows:
    """Return rows without the names and offsets of blobs, which each attempt chooses."""
    for row in rows:
        for image in row["images"] or []:
            del image["blob"], image["offset"]
    return rows


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bytes, str | None]]:
    """A raw folder of messages, and each line's reason."""
    raw = tmp_path_factory.mktemp("planted") / "raw"
    write_pictures(raw / "deep")
    good = lines([conversation(str(n), answer=f"Picture é {n}.") for n in range(10)])
    good += lines([conversation(None, "Just talk, please.")])
    reasons: dict[bytes, str | None] = dict.fromkeys(good)
    reasons |= {lines([row])[0]: reason for reason, row in bad_conversations()}
    broken = [
        b"{broken",
        b"[]",
        b'{"messages": "\xff"}',
        b'{"messages": [{"role": "assistant", "content": "\\ud800abc"}]}',
    ]
    reasons |= dict.fromkeys(broken, "malformed_row")
    reasons |= {lines([conversation("10", answer="Picture é 0.")])[0]: "duplicate"}  # other name, same bytes as 0
    write_lines(raw / "deep" / "a.jsonl", list(reasons))
    write_lines(raw / "deep" / "_hidden.jsonl", [b"{"])
    return raw, reasons


@pytest.fixture(scope="module")
def done(planted: tuple[Path, dict[bytes, str | None]], spark: SparkSession) -> Path:
    raw, _ = planted
    out = raw.parent / "done"
    PreprocessStage(str(raw), str(out / "checked"), "messages").run()
    FilterStage(str(out / "checked"), str(out / "clean")).run()
    return out


def test_every_planted_row_has_its_reason(planted: tuple[Path, dict[bytes, str | None]], done: Path) -> None:
    _, reasons = planted
    rows = read(done / "clean" / "data") + read(done / "clean" / "quarantine")
    found = {row["raw"]: row["reason"] for row in rows}
    assert found == {line.decode(errors="backslashreplace"): reason for line, reason in reasons.items()}
    assert len(rows) == len(reasons)
    for row in read(done / "clean" / "quarantine"):
        assert row["evidence"]
        assert row["sample_id"] >= 0
    (duplicate,) = (row for row in rows if row["reason"] == "duplicate")
    assert duplicate["evidence"] == "the same content as deep/a.jsonl @ 0, and 2 times in all"


def test_counts_in_the_report(planted: tuple[Path, dict[bytes, str | None]], done: Path) -> None:
    _, reasons = planted
    expected: dict[str, int] = {}
    for reason in filter(None, reasons.values()):
        expected[reason] = expected.get(reason, 0) + 1
    report = Report.load(Folder(str(done / "clean")), "filter")
    assert report.counts.quarantined == report.reasons == report.since_raw.quarantined == expected
    assert (report.counts.rows_in, report.counts.rows_out) == (len(reasons), 11)
    page = (done / "clean" / "report.html").read_text()
    assert "image_path_escapes" in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_report_shows_pictures_of_bad_rows_and_all_values(done: Path) -> None:
    checked, clean = (Report.load_if_there(Folder(str(done / name))) for name in ("checked", "clean"))
    assert checked is not None
    assert clean is not None
    for report in (checked, clean):  # filter shows again what only preprocess, which knows the raw folder, can read
        pictures = {r: [image for e in shown for image in e.images] for r, shown in report.examples.items()}
        assert not pictures["image_missing"]
        assert not pictures["image_path_escapes"]
        (small,) = pictures["image_too_small"][:1]
        assert max(Image.open(io.BytesIO(base64.b64decode(small.partition(",")[2]))).size) <= 96
    assert clean.examples["duplicate"][0].images  # from its blob
    sizes = [len(row["raw"].encode()) for row in read(done / "checked" / "data")]
    assert Histogram.of("bytes a raw row", np.array(sizes)) == checked.distributions[0]
    sides = [max(i["width"], i["height"]) for row in read(done / "checked" / "data") for i in row["images"] or []]
    assert Histogram.of("long side of an image, pixels", np.array(sides)) in checked.distributions


def test_refs_give_the_images_that_were_named(planted: tuple[Path, dict[bytes, str | None]], done: Path) -> None:
    raw, _ = planted
    for row in read(done / "clean" / "data"):
        names = json.loads(row["raw"]).get("images", [])
        assert len(row["images"]) == len(names)
        for ref, name in zip(row["images"], names):
            data = Folder(ref["blob"].rsplit("/", 1)[0]).read(ref["blob"].rsplit("/", 1)[1], ref["offset"], ref["size"])
            assert data == (raw / "deep" / name).read_bytes()
            assert (ref["width"], ref["height"]) == Image.open(io.BytesIO(data)).size


@pytest.mark.parametrize("dataset", ["llava", "text"])
def test_the_other_formats(dataset: str, spark: SparkSession, tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "in"
    write_pictures(raw)
    if dataset == "llava":
        good = [as_llava(conversation(str(n), answer=f"It is {n}.")) for n in range(10)]
        good += [as_llava(conversation(None, "Talk."))]
        bad = [(reason, as_llava(row)) for reason, row in bad_conversations() if row.get("messages")]
        bad += [("malformed_row", {"conversations": None}), ("malformed_row", {"image": "1.png"})]
        bad += [("malformed_row", {"conversations": [{"from": "narrator", "value": "It rains."}]})]
    else:
        good = [{"text": f"document {n} with <image> in it"} for n in range(20)]
        bad = [
            ("text_too_short", {"text": " abc\n"}),
            ("malformed_row", {"text": None}),
            ("malformed_row", {"txt": ""}),
        ]
    bad += [("duplicate", good[3] | {"other": "field"})]
    write_lines(raw / "x.jsonl", lines(good + [row for _, row in bad]))
    PreprocessStage(str(tmp_path / "raw"), str(tmp_path / "checked"), dataset).run()
    FilterStage(str(tmp_path / "checked"), str(tmp_path / "clean")).run()
    kept, quarantined = read(tmp_path / "clean" / "data"), read(tmp_path / "clean" / "quarantine")
    assert [json.loads(row["raw"]) for row in kept] == good
    assert [(row["reason"], json.loads(row["raw"])) for row in quarantined] == bad


def test_parquet_with_images_in_it_is_the_same_as_jsonl(done: Path, spark: SparkSession, tmp_path: Path) -> None:
    """Also the input may be a single file, and its bad pictures have their reasons."""
    good = [row for row in read(done / "clean" / "data") if row["images"]]
    raw = done.parent / "raw" / "deep"
    rows = [json.loads(row["raw"]) for row in good]
    rows += [row for reason, row in bad_conversations() if reason in ("image_too_small", "image_unreadable")]
    for row in rows:
        row["images"] = [{"bytes": (raw / name).read_bytes(), "path": None} for name in row["images"]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=3)
    PreprocessStage(str(tmp_path / "in.parquet"), str(tmp_path / "out"), "messages").run()
    found = read(tmp_path / "out" / "data")
    assert [row["position"] for row in found] == list(range(12))
    assert [row["content_hash"] for row in found[:10]] == [row["content_hash"] for row in good]
    assert [row["reason"] for row in found] == [None] * 10 + ["image_too_small", "image_unreadable"]
    assert json.loads(found[0]["raw"])["images"][0]["bytes"] == f"<{found[0]['images'][0]['size']} bytes>"


def test_many_tiny_tasks_give_the_same_rows(
    planted: tuple[Path, dict[bytes, str | None]], done: Path, spark: SparkSession, tmp_path: Path
) -> None:
    raw, _ = planted
    checked, clean = str(tmp_path / "checked"), str(tmp_path / "clean")
    TinyTasks(str(raw), checked, "messages").run()
    assert len(list(Path(checked, "data").glob("*.parquet"))) > 3
    assert content(read(Path(checked, "data"))) == content(read(done / "checked" / "data"))
    usual = spark_session().conf.get("spark.sql.files.maxPartitionBytes")
    spark_session().conf.set("spark.sql.files.maxPartitionBytes", "3000")
    try:
        FilterStage(checked, clean).run()
    finally:
        spark_session().conf.set("spark.sql.files.maxPartitionBytes", usual)
    for part in ("data", "quarantine"):
        assert content(read(Path(clean, part))) == content(read(done / "clean" / part))


def test_blobs_and_attempts_of_dead_runs_are_removed(
    planted: tuple[Path, dict[bytes, str | None]], done: Path, spark: SparkSession, tmp_path: Path
) -> None:
    raw, _ = planted
    dead = tmp_path / f"_attempt-out-{'0' * 32}"
    others = tmp_path / f"_attempt-out-2-{'0' * 32}"
    for folder in (dead, others):
        folder.mkdir()

    class Interrupted(PreprocessStage):
        """A task attempt that left a blob, and whose rows were not taken."""

        def transform(self, rows: Any, attempt: Any) -> Any:
            with (attempt.folder / "blobs").create("lost.blob") as stream:
                stream.write(b"lost")
            return super().transform(rows, attempt)

    Interrupted(str(raw), str(tmp_path / "out"), "messages").run()
    used = {ref["blob"] for row in read(tmp_path / "out" / "data") for ref in row["images"] or []}
    assert {f"file://{path}" for path in (tmp_path / "out" / "blobs").iterdir()} == used
    assert not dead.exists()
    assert others.exists()
