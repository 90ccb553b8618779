"""Raw rows for scale.py: documents, chats, and questions about small pictures, unlike one another.

Text is cut from Python's library sources and documentation at random places. A file is a function of its number alone.
"""

import io
import json
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FILE_ROWS = 10_000
CORPUS_CHARACTERS = 16_000_000
DOCUMENT, QUESTION, ANSWER = (200, 5_000), (20, 400), (100, 1_200)  # characters: least, most


def write_raw(folder: Path, kind: str, rows: int, processes: int) -> int:
    """Write `rows` rows of a kind (documents | chats | pictures) in files of FILE_ROWS; return their bytes of JSON."""
    folder.mkdir(parents=True, exist_ok=True)  # a run that was stopped
    counts = [min(FILE_ROWS, rows - start) for start in range(0, rows, FILE_ROWS)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        size = len(counts)
        return sum(pool.map(_write_file, [folder] * size, [kind] * size, range(size), counts))


def _write_file(folder: Path, kind: str, number: int, count: int) -> int:
    rng = np.random.default_rng([number, len(kind)])
    rows = _ROWS[kind](rng, number * FILE_ROWS, count)
    if kind == "pictures":  # images in the row: parquet
        table = pa.Table.from_pylist([row | {"images": [_picture(rng)]} for row in rows])
        pq.write_table(table, folder / f"{number:05}.parquet")
        return sum(len(json.dumps(row)) for row in table.select(["messages"]).to_pylist())
    with open(folder / f"{number:05}.jsonl", "w") as stream:
        return sum(stream.write(json.dumps(row) + "\n") for row in rows)


def _documents(rng: np.random.Generator, first: int, count: int) -> Iterator[dict[str, Any]]:
    for number in range(first, first + count):
        yield {"text": f"{number} {_cut(rng, DOCUMENT)}"}


def _chats(rng: np.random.Generator, first: int, count: int) -> Iterator[dict[str, Any]]:
    """One to four questions, each with its answer."""
    for number in range(first, first + count):
        turns = [("user", QUESTION), ("assistant", ANSWER)] * int(rng.integers(1, 5))
        yield {"messages": [{"role": role, "content": f"{number} {_cut(rng, size)}"} for role, size in turns]}


def _pictures(rng: np.random.Generator, first: int, count: int) -> Iterator[dict[str, Any]]:
    for number in range(first, first + count):
        question = {"role": "user", "content": f"<image> {number} {_cut(rng, ANSWER)}"}
        yield {"messages": [question, {"role": "assistant", "content": f"answer {number}"}]}


_ROWS = {"documents": _documents, "chats": _chats, "pictures": _pictures}


def _picture(rng: np.random.Generator) -> bytes:
    """Return a JPEG of 64 x 64 pixels, 3 kB, unlike the others."""
    encoded = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((64, 64)).save(encoded, "JPEG")
    return encoded.getvalue()


def _cut(rng: np.random.Generator, characters: tuple[int, int]) -> str:
    length = int(rng.integers(*characters))
    start = int(rng.integers(len(_corpus()) - length))
    return _corpus()[start : start + length]


@cache
def _corpus() -> str:
    library = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    sources = (path for path in library if "site-packages" not in path.parts and "test" not in path.parts)
    return "\n".join([*topics.values(), *(path.read_text(errors="replace") for path in sources)])[:CORPUS_CHARACTERS]
