"""Raw rows with pictures, and what preprocess and filter make of them."""

import io
import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from kanyun.storage import Folder
from pipeline.reports.report import Report
from pipeline.stages.filter import FilterStage
from pipeline.stages.preprocess import PreprocessStage

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
    """Run preprocess and filter; return the rows of data/ and of quarantine/, and the report of filter."""
    out = raw.parent
    PreprocessStage(raw.uri, (out / "checked").uri, dataset).run()
    report = FilterStage((out / "checked").uri, (out / "clean").uri, near_duplicates).run()
    return read(out / "clean" / "data"), read(out / "clean" / "quarantine"), report
