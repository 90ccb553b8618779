"""Made-up outputs of stages, of any size: what the later stages read, without the work of the earlier ones."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from kanyun.storage import Folder
from pipeline.images.blobs import short_digest
from pipeline.reports.report import Report, RowCounts
from pipeline.schema import BUILT, VERSIONS
from tests.support.qwen_assets import tiny_vl_folder

IMAGE_BYTES = 130_000  # a JPEG of about 800 x 600 pixels
GRID = (1, 44, 58)  # its patches, 638 tokens
ROWS_A_FILE = 2_000
IMAGES_A_BLOB, BLOBS = 1_000, 4


def write_built(folder: Path, samples: int, length: int, images: bool = True) -> None:
    """An output of build: `samples` of an image and 20 to 400 tokens of text each, or of text alone.

    Images are random bytes in blobs beside it, which several samples share.
    """
    rng = np.random.default_rng(samples)
    blobs = [folder.parent / "blobs" / f"{n}.blob" for n in range(BLOBS if images else 0)]
    for blob in blobs:
        blob.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            blob.write_bytes(rng.bytes(IMAGE_BYTES * IMAGES_A_BLOB))
    refs = [ref for blob in blobs for ref in _refs(blob)]
    (folder / "data").mkdir(parents=True)
    for first in range(0, samples, ROWS_A_FILE):
        numbers = np.arange(first, min(first + ROWS_A_FILE, samples))
        rows = [_row(int(n), refs, rng) for n in numbers]
        pq.write_table(pa.Table.from_pylist(rows, BUILT), folder / "data" / f"part-{first}.parquet", compression="zstd")
    tiny_vl_folder(folder / "tokenizer")
    counts = RowCounts(samples, samples)
    settings = {"tokenizer": "", "length": length, "overflow": "drop", "version": VERSIONS["build"]}
    settings |= {"epoch": 0, "seed": 0, "ratios": {".": "1"}}
    Report("build", settings, "", str(samples), counts, counts, 0.0).save(Folder(str(folder)))


def _refs(blob: Path) -> Iterator[dict[str, object]]:
    """An IMAGE_REF for each image of a blob."""
    data = blob.read_bytes()
    for offset in range(0, len(data), IMAGE_BYTES):
        digest = short_digest(xxhash.xxh3_128_digest(data[offset : offset + IMAGE_BYTES]))
        place = {"blob": blob.as_uri(), "offset": offset, "size": IMAGE_BYTES}
        yield place | {"width": 800, "height": 600, "digest": digest, "looks": 0}


def _row(number: int, refs: list[dict[str, object]], rng: np.random.Generator) -> dict[str, object]:
    tokens = int(rng.integers(20, 400))
    row = {
        "sample_id": number,
        "dataset": "made",
        "file": "made",
        "position": number,
        "copy": 0,
        "piece": 0,
        "images": [],
        "image_grid_thw": [],
    }
    if refs:
        row |= {"images": [refs[number % len(refs)]], "image_grid_thw": [GRID]}
        tokens += math.prod(GRID) // 4
    ids = rng.integers(0, 150_000, tokens, dtype=np.int32)
    patches = math.prod(GRID) if refs else 0
    return row | {"input_ids": ids, "loss_mask": ids % 2 == 0, "tokens": tokens, "patches": patches}
