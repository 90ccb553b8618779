"""Clean rows as filter leaves them, made without Spark, and what later stages made of them."""

import io
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from PIL import Image

from kanyun.storage import Folder
from pipeline.images.blobs import short_digest
from pipeline.reports.report import Report, RowCounts
from pipeline.schema import SAMPLE, VERSIONS


def picture(rng: random.Random) -> tuple[bytes, int, int]:
    width, height = rng.randint(28, 200), rng.randint(28, 200)
    data = io.BytesIO()
    Image.new("RGB", (width, height), tuple(rng.randbytes(3))).save(data, "PNG")
    return data.getvalue(), width, height


def part(value: str | None) -> dict[str, str | None]:
    return {"type": "text" if value is not None else "image", "text": value}


class Raw:
    """Clean rows as filter leaves them, with images in one blob: of four, two have an image, one is a document."""

    def __init__(self, root: Path, count: int, seed: int = 0):
        rng = random.Random(seed)
        self.rows: dict[int, dict[str, Any]] = {}
        self.images: dict[int, list[bytes]] = {}
        blob = root.parent / f"{root.name}-blob"
        root.mkdir(parents=True)
        offset, stored = 0, b""
        for number in range(count):
            sample_id = rng.getrandbits(63)
            row: dict[str, Any] = dict.fromkeys(SAMPLE.names)
            row |= {"sample_id": sample_id, "dataset": "made", "file": "a.jsonl", "position": number, "images": []}
            row |= {"content_hash": rng.randbytes(16), "raw": f"raw {number}"}
            words = " ".join(
                rng.choices(["the", "import", "statement", "naïve", "你好", "\n", "x"], k=rng.randint(1, 40))
            )
            if number % 4 == 3:
                row["text"] = words
            else:
                content = [part(words)]
                if number % 4 < 2:
                    data, width, height = picture(rng)
                    digest = short_digest(xxhash.xxh3_128_digest(data))
                    ref = {"blob": blob.as_uri(), "offset": offset, "size": len(data), "digest": digest}
                    row["images"] = [ref | {"width": width, "height": height}]
                    stored, offset = stored + data, offset + len(data)
                    self.images[sample_id] = [data]
                    content.insert(rng.randint(0, 1), part(None))
                answer = {"role": "assistant", "content": [part(f"answer {number}")]}
                row["messages"] = [{"role": "user", "content": content}, answer]
            self.rows[sample_id] = row
        blob.write_bytes(stored)
        save_filtered(root, list(self.rows.values()))


def save_filtered(root: Path, rows: list[dict[str, Any]], files: int = 3) -> None:
    for n in range(files):
        path = root / "data" / f"part-{n}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows[n::files], SAMPLE), path)
    counts = RowCounts(len(rows), len(rows))
    Report("filter", {"version": VERSIONS["filter"]}, "none", f"{len(rows)}", counts, counts, 0.0).save(
        Folder(str(root))
    )


def read(folder: Path, name: str = "data") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / name).to_pylist()
    return rows
