"""Write docs/gallery.md: each reason code with the row and the picture that earn it.

The rows are planted here, and the five stages find them: reason and evidence on the page are theirs. It takes a minute.

usage: python -m docs.make_gallery [DOCS]
"""

import io
import json
import os
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from jobs.demo.make_model import write_model
from pipeline.checks import CHECKS, MAX_ROW, Reason
from pipeline.recipe import Recipe, RecipeDataset

LENGTH = 128  # of a pack: short, so that a short text is too long
ROWS, PICTURES = "rows.jsonl", "pictures"
SHOWN = 420  # characters of a row
TOOL = {"type": "function", "function": {"name": "zoom", "parameters": {"type": "object", "properties": {}}}}
INTRODUCTION = """\
# A gallery of bad data

Every reason for which a row is not trained on, with rows that earn it. They were planted by `docs/make_gallery.py`; the
pipeline found them, and each *evidence* is what it wrote into `quarantine/` (RAW is the raw folder). A test makes this
page again and compares.

In your own data: `report.html` of every stage counts the reasons and shows rows with their pictures, and `quarantine/`
is parquet:

    import pyarrow.parquet as pq
    columns = ["file", "position", "reason", "evidence", "raw"]
    pq.read_table("run/filter/NAME/quarantine", columns=columns).to_pandas()
"""


@dataclass(frozen=True)
class Plant:
    """A planted row."""

    reason: Reason | None  # None: a good row, which another one repeats
    row: dict[str, Any] | str
    says: str  # the caption: what is wrong with the row
    pictures: tuple[str, ...] = ()  # of the page, in RAW/pictures


def blobs(width: int, height: int, seed: int) -> Image.Image:
    """A picture of soft colours; two seeds never look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of a few kilobytes whose header claims 30,000 x 30,000 pixels."""
    data = bytearray(encoded(blobs(64, 64, 1)))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def write_pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    good = blobs(160, 110, 0)
    for name, data in {
        "good.jpg": encoded(good, "JPEG", quality=90),
        "smaller.jpg": encoded(good.resize((120, 84)), "JPEG", quality=60),
        "truncated.jpg": encoded(blobs(160, 110, 2), "JPEG", quality=90)[:2000],
        "no_picture.jpg": b"<html><body>404 Not Found</body></html>\n",
        "small.png": encoded(blobs(24, 60, 3)),
        "narrow.png": encoded(blobs(5640, 28, 4)),
        "bomb.png": bomb(),
        "exif.png": encoded(blobs(160, 110, 5), exif=b"Exif\0\0damaged"),
        "one.png": encoded(blobs(96, 72, 6)),
    }.items():
        (folder / name).write_bytes(data)
    (folder.parent.parent / "outside.png").write_bytes(encoded(blobs(64, 64, 7)))


def asked(
    picture: str | None, question: str = "<image>What is this?", answer: str = "Soft colours.", **more: Any
) -> Any:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **({"images": [f"{PICTURES}/{picture}"]} if picture else {}), **more}


def plants() -> list[Plant]:
    """Return them in the order of their rows. The first row is good."""
    one = ("one.png",)
    talk = [{"role": "user", "content": "Hello?"}]
    return [
        Plant(None, asked("good.jpg"), "", ("good.jpg",)),
        Plant(Reason.MALFORMED_ROW, '{"messages": [{"role": "user", "content": "cut off in the mid', "A line cut off."),
        Plant(Reason.MALFORMED_ROW, {"messages": talk}, "A question that nobody answers."),
        Plant(Reason.VIDEO, asked(None, "What happens?", "A goal.", video="match.mp4"), "A video beside the messages."),
        Plant(
            Reason.AUDIO, asked(None, "Who sings?", "A wren.", audios=["wren.wav"]), "A recording beside the messages."
        ),
        Plant(
            Reason.IMAGE_COUNT_MISMATCH,
            asked("one.png", "<image><image>Which is larger?", "The first."),
            "Two places, one picture.",
            one,
        ),
        Plant(Reason.IMAGE_COUNT_MISMATCH, asked(None), "A place, and the export forgot its picture."),
        Plant(Reason.TEXT_TOO_SHORT, asked("one.png", "<image>", "no"), "A picture, and hardly a word.", one),
        Plant(Reason.TEXT_TOO_SHORT, asked("one.png", answer=" "), "An answer of white space.", one),
        Plant(Reason.IMAGE_PATH_ESCAPES, asked("../../outside.png"), "A path that leads out of the raw folder."),
        Plant(
            Reason.IMAGE_PATH_ESCAPES,
            asked(None, images=["https://example.com/a.jpg"]),
            "A URL: the pipeline downloads nothing.",
        ),
        Plant(Reason.IMAGE_MISSING, asked("nowhere.png"), "A picture that was not copied."),
        Plant(Reason.IMAGE_TOO_LARGE, asked("bomb.png"), "Kilobytes that would be 900 million pixels; not shown."),
        Plant(Reason.IMAGE_UNREADABLE, asked("truncated.jpg"), "A download that stopped.", ("truncated.jpg",)),
        Plant(Reason.IMAGE_UNREADABLE, asked("no_picture.jpg"), "A server's error page under a picture's name."),
        Plant(Reason.IMAGE_TOO_SMALL, asked("small.png"), "An icon.", ("small.png",)),
        Plant(Reason.IMAGE_ASPECT_RATIO, asked("narrow.png"), "A line.", ("narrow.png",)),
        Plant(
            Reason.PROCESSOR_FAILED,
            asked("exif.png"),
            "Its pixels are sound. transformers also reads which side the camera held up, and fails there.",
            ("exif.png",),
        ),
        Plant(
            Reason.PROCESSOR_FAILED,
            asked(None, "Zoom in.", "I will.", tools=[TOOL]),
            "Tools, and a chat template that does not print them: the model would learn to call what it cannot see.",
        ),
        Plant(Reason.DUPLICATE, asked("good.jpg"), "The first row of the file once more.", ("good.jpg",)),
        Plant(
            Reason.NEAR_DUPLICATE,
            asked("smaller.jpg", "<image>And this?", "Colours again."),
            "The first row's picture, smaller and compressed harder, under another question.",
            ("good.jpg", "smaller.jpg"),
        ),
        Plant(Reason.TOO_LONG, {"messages": [*talk, {"role": "assistant", "content": "yes " * 200}]}, "A long answer."),
    ]


def write_raw(raw: Path) -> dict[tuple[str, int], Plant]:
    """Write rows and pictures; return the plant of each file and byte offset."""
    write_pictures(raw / PICTURES)
    placed, offset = {}, 0
    with (raw / ROWS).open("wb") as stream:
        for plant in plants():
            text = plant.row if isinstance(plant.row, str) else json.dumps(plant.row, ensure_ascii=False)
            placed[ROWS, offset] = plant
            offset += stream.write(text.encode() + b"\n")
    huge = '{"text": "' + "na " * (MAX_ROW // 3) + '"}\n'
    (raw / "huge.jsonl").write_text(huge)
    placed["huge.jsonl", 0] = Plant(
        Reason.ROW_TOO_LARGE, huge[:SHOWN], "A book in one line, or a file without line ends."
    )
    return placed


def run_pipeline(here: Path) -> list[dict[str, Any]]:
    """Run the five stages; return the quarantined rows."""
    write_model([topics[name] for name in sorted(topics)[:20]], here / "model", "qwen2_5_vl")
    datasets = {"gallery": RecipeDataset(str(here / "raw"), "messages")}
    recipe = Recipe(str(here / "run"), str(here / "model"), LENGTH, datasets, near_duplicates="drop")
    recipe.run(overwrite=False)
    folders = (here / "run/filter/gallery/quarantine", here / "run/build/quarantine")
    return [row for folder in folders for row in pq.read_table(folder).to_pylist()]


def entry(plant: Plant, found: dict[str, Any], raw: Path) -> str:
    """One planted row and what the pipeline says about it."""
    row = plant.row if isinstance(plant.row, str) else json.dumps(plant.row, ensure_ascii=False)
    row = row if len(row) < SHOWN else row[: SHOWN - 20] + " ..."
    evidence = found["evidence"].replace(str(raw), "RAW").replace("|", "\\|")
    size = 'width="600"' if plant.reason == Reason.IMAGE_ASPECT_RATIO else 'height="80"'
    pictures = "".join(f'<img src="gallery/{name}" alt="{name}" {size}>\n' for name in plant.pictures)
    return f"{plant.says}\n\n```\n{row}\n```\n\n{pictures and pictures + chr(10)}*Evidence:* {evidence}\n"


def make(docs: Path, here: Path) -> str:
    """Write gallery.md and its pictures below `docs`, with `here` as the place to work; return the page.

    Raises ValueError if the pipeline finds another reason than the one that was planted.
    """
    placed = write_raw(here / "raw")
    found = {(row["file"], row["position"]): row for row in run_pipeline(here)}
    planted = {place: plant.reason for place, plant in placed.items() if plant.reason}
    reasons = {place: row["reason"] for place, row in found.items()}
    if planted != reasons:
        raise ValueError(f"planted {planted}, found {reasons}")
    page = [INTRODUCTION]
    for check in CHECKS:
        limit = f" Limit: {check.limit}." if check.limit else ""
        page.append(f"## {check.reason}\n\nA row that {check.row}.{limit}\n")
        page += [
            entry(plant, found[place], here / "raw") for place, plant in placed.items() if plant.reason == check.reason
        ]
    (docs / "gallery").mkdir(parents=True, exist_ok=True)
    for name in sorted({name for plant in placed.values() for name in plant.pictures}):
        (docs / "gallery" / name).write_bytes((here / "raw" / PICTURES / name).read_bytes())
    text = "\n".join(page)
    (docs / "gallery.md").write_text(text)
    return text


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        make(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"), Path(folder))
