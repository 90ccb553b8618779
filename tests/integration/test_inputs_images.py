"""preprocess and filter on images that are hostile, damaged, or look alike."""

import io
import json
import shutil
from pathlib import Path
from unittest.mock import patch

import psutil
from PIL import Image
from pyspark.sql import SparkSession

from kanyun.storage import Folder
from pipeline.spark import spark_session
from pipeline.stages.filter import FilterStage
from pipeline.stages.preprocess import PreprocessStage
from tests.support.image_zoo import BAD, GOOD, HOSTILE
from tests.support.raw_inputs import conversation, jsonl, picture, read, run


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
