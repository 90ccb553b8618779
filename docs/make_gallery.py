"""Write docs/gallery.md, and docs/zh/gallery.md in Chinese: each reason code with the row and the picture that earn it.

The rows are planted here, and the five stages find them: reason and evidence on the page are theirs. It takes a minute.
"""

import io
import json
import os
import re
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
from kanyun.cli.parser import Parser
from pipeline.checks import CHECKS, MAX_ROW, Reason
from pipeline.recipe import Recipe, RecipeDataset

ROOT = Path(__file__).parents[1]
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
CHINESE_INTRODUCTION = """\
# 坏数据图鉴

每一种不参与训练的原因，以及属于它的行。这些坏行由 `docs/make_gallery.py` 埋进去，由流水线找出来；\
*证据*是流水线写进 `quarantine/` 的原文（RAW 是原始数据目录）。\
有测试会重新生成本页并对照。

在你自己的数据里：每个阶段的 `report.html` 按原因计数，并显示坏行和它们的图片；`quarantine/` 是 parquet：

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
    chinese: str  # the same
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
        Plant(None, asked("good.jpg"), "", "", ("good.jpg",)),
        Plant(
            Reason.MALFORMED_ROW,
            '{"messages": [{"role": "user", "content": "cut off in the mid',
            "A line cut off.",
            "一行被截断。",
        ),
        Plant(Reason.MALFORMED_ROW, {"messages": talk}, "A question that nobody answers.", "只有提问，没有回答。"),
        Plant(
            Reason.VIDEO,
            asked(None, "What happens?", "A goal.", video="match.mp4"),
            "A video beside the messages.",
            "消息之外带了视频。",
        ),
        Plant(
            Reason.AUDIO,
            asked(None, "Who sings?", "A wren.", audios=["wren.wav"]),
            "A recording beside the messages.",
            "消息之外带了录音。",
        ),
        Plant(
            Reason.IMAGE_COUNT_MISMATCH,
            asked("one.png", "<image><image>Which is larger?", "The first."),
            "Two places, one picture.",
            "两个占位符，一张图片。",
            one,
        ),
        Plant(
            Reason.IMAGE_COUNT_MISMATCH,
            asked(None),
            "A place, and the export forgot its picture.",
            "有占位符，导出时漏了图片。",
        ),
        Plant(
            Reason.TEXT_TOO_SHORT,
            asked("one.png", "<image>", "no"),
            "A picture, and hardly a word.",
            "有图片，几乎没有文字。",
            one,
        ),
        Plant(
            Reason.TEXT_TOO_SHORT, asked("one.png", answer=" "), "An answer of white space.", "回答只有空白字符。", one
        ),
        Plant(
            Reason.IMAGE_PATH_ESCAPES,
            asked("../../outside.png"),
            "A path that leads out of the raw folder.",
            "路径指到了原始数据目录之外。",
        ),
        Plant(
            Reason.IMAGE_PATH_ESCAPES,
            asked(None, images=["https://example.com/a.jpg"]),
            "A URL: the pipeline downloads nothing.",
            "URL：流水线不下载任何东西。",
        ),
        Plant(Reason.IMAGE_MISSING, asked("nowhere.png"), "A picture that was not copied.", "图片没有拷过来。"),
        Plant(
            Reason.IMAGE_TOO_LARGE,
            asked("bomb.png"),
            "Kilobytes that would be 900 million pixels; not shown.",
            "几 KB 的文件，解开是 9 亿像素；这里不显示。",
        ),
        Plant(
            Reason.IMAGE_UNREADABLE,
            asked("truncated.jpg"),
            "A download that stopped.",
            "下载到一半就停了。",
            ("truncated.jpg",),
        ),
        Plant(
            Reason.IMAGE_UNREADABLE,
            asked("no_picture.jpg"),
            "A server's error page under a picture's name.",
            "名字是图片，内容是服务器的报错页面。",
        ),
        Plant(Reason.IMAGE_TOO_SMALL, asked("small.png"), "An icon.", "一个小图标。", ("small.png",)),
        Plant(Reason.IMAGE_ASPECT_RATIO, asked("narrow.png"), "A line.", "一条细线。", ("narrow.png",)),
        Plant(
            Reason.PROCESSOR_FAILED,
            asked("exif.png"),
            "Its pixels are sound. transformers also reads which side the camera held up, and fails there.",
            "像素是好的；transformers 还要读相机方向（EXIF），在那里失败。",
            ("exif.png",),
        ),
        Plant(
            Reason.PROCESSOR_FAILED,
            asked(None, "Zoom in.", "I will.", tools=[TOOL]),
            "Tools, and a chat template that does not print them: the model would learn to call what it cannot see.",
            "带了工具，而对话模板不渲染工具：模型会学着调用它看不见的东西。",
        ),
        Plant(
            Reason.DUPLICATE,
            asked("good.jpg"),
            "The first row of the file once more.",
            "文件的第一行又出现一次。",
            ("good.jpg",),
        ),
        Plant(
            Reason.NEAR_DUPLICATE,
            asked("smaller.jpg", "<image>And this?", "Colours again."),
            "The first row's picture, smaller and compressed harder, under another question.",
            "第一行的图片缩小并重新压缩，换了一个问题。",
            ("good.jpg", "smaller.jpg"),
        ),
        Plant(
            Reason.TOO_LONG,
            {"messages": [*talk, {"role": "assistant", "content": "yes " * 200}]},
            "A long answer.",
            "很长的回答。",
        ),
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
        Reason.ROW_TOO_LARGE,
        huge[:SHOWN],
        "A book in one line, or a file without line ends.",
        "一行就是一本书，或文件里没有换行。",
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


def entry(plant: Plant, caption: str, found: dict[str, Any], raw: Path, pictures: str) -> str:
    """One planted row and what the pipeline says about it. `pictures`: their folder, from the page."""
    row = plant.row if isinstance(plant.row, str) else json.dumps(plant.row, ensure_ascii=False)
    row = row if len(row) < SHOWN else row[: SHOWN - 20] + " ..."
    evidence = found["evidence"].replace(str(raw), "RAW").replace("|", "\\|")
    size = 'width="600"' if plant.reason == Reason.IMAGE_ASPECT_RATIO else 'height="80"'
    shown = "".join(f'<img src="{pictures}/{name}" alt="{name}" {size}>\n' for name in plant.pictures)
    return f"{caption}\n\n```\n{row}\n```\n\n{shown and shown + chr(10)}*Evidence:* {evidence}\n"


def chinese_reasons() -> dict[str, str]:
    """What a row of each reason is, in Chinese, with its limit: the table of docs/zh/datasets.md."""
    text = (ROOT / "docs/zh/datasets.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) ?\|$", text, re.MULTILINE)
    return {reason: f"{row}。{limit and f'限制：{limit}。'}" for reason, row, limit in rows}


def make(docs: Path, here: Path) -> tuple[str, str]:
    """Write both pages and their pictures below `docs`, with `here` as the place to work; return the pages.

    Raises ValueError if the pipeline finds another reason than the one that was planted.
    """
    raw = here / "raw"
    placed = write_raw(raw)
    found = {(row["file"], row["position"]): row for row in run_pipeline(here)}
    planted = {place: plant.reason for place, plant in placed.items() if plant.reason}
    reasons = {place: row["reason"] for place, row in found.items()}
    if planted != reasons:
        raise ValueError(f"planted {planted}, found {reasons}")
    english, chinese, in_chinese = [INTRODUCTION], [CHINESE_INTRODUCTION], chinese_reasons()
    for check in CHECKS:
        limit = f" Limit: {check.limit}." if check.limit else ""
        english.append(f"## {check.reason}\n\nA row that {check.row}.{limit}\n")
        chinese.append(f"## {check.reason}\n\n{in_chinese[check.reason]}\n")
        for place, plant in placed.items():
            if plant.reason == check.reason:
                english.append(entry(plant, plant.says, found[place], raw, "gallery"))
                translated = entry(plant, plant.chinese, found[place], raw, "../gallery")
                chinese.append(translated.replace("*Evidence:*", "*证据：*"))
    for folder in ("gallery", "zh"):
        (docs / folder).mkdir(parents=True, exist_ok=True)
    for name in sorted({name for plant in placed.values() for name in plant.pictures}):
        (docs / "gallery" / name).write_bytes((raw / PICTURES / name).read_bytes())
    pages = "\n".join(english), "\n".join(chinese)
    for page, text in zip(("gallery.md", "zh/gallery.md"), pages):
        (docs / page).write_text(text, encoding="utf-8")
    return pages


if __name__ == "__main__":
    parser = Parser(prog="python -m docs.make_gallery", description=__doc__, example="python -m docs.make_gallery")
    parser.add_argument("docs", nargs="?", type=Path, default=ROOT / "docs", help="where the pages go (docs/)")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        make(parser.parse_args().docs, Path(folder))
