"""Write demo/raw: real inputs that Python packages ship, in the three formats the pipeline reads without any code.

  raw/digits        messages   scikit-learn's scanned digits, enlarged to mixed sizes, as questions and answers
  raw/digits_llava  llava      the same scans at other sizes
  raw/pydoc         text       Python's own documentation
  validation/...    messages   97 further scans, for the loss printed during training
  heldout/...       messages   300 further scans, which only score.py looks at

Among the good rows lies one planted bad row for each reason code; raw/planted.json says which and why, and result.py
compares it with the pipeline's quarantine.

usage: make_raw.py OUT
example: python jobs/demo/make_raw.py demo
"""

import io
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

VALIDATION, HELD_OUT = 97, 300
VARIANTS = 2  # pictures of each scan in each of the two digit folders
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
QUESTIONS = [
    "Which digit is this?",
    "What digit do you see?",
    "Read the digit, please.",
    "A scan of one digit. Which one?",
    "Name the number in the picture.",
]
LONGEST_DOCUMENT = 1200  # characters: 32 topics; all 79 would make the digits a small part of the loss


class RawFolder:
    """One raw dataset: rows of a jsonl file beside their images, and a note of which rows are planted."""

    def __init__(self, folder: Path, file: str, planted: list[dict[str, Any]]):
        self.folder, self.file, self.planted = folder, file, planted
        (folder / "scans").mkdir(parents=True)
        self.lines: list[bytes] = []
        self.images = 0

    def image(self, picture: Image.Image, format: str) -> str:
        """Save a picture; returns its path as a row names it."""
        path = f"scans/{self.images:05d}.{format}"
        picture.save(self.folder / path)
        self.images += 1
        return path

    def image_bytes(self, data: bytes, suffix: str = "png") -> str:
        path = f"scans/{self.images:05d}.{suffix}"
        (self.folder / path).write_bytes(data)
        self.images += 1
        return path

    def row(self, row: dict[str, Any] | str, reason: str | None = None) -> None:
        """Append a row; with a `reason`, it is a planted bad one. Its position is its byte offset."""
        if reason:
            position = sum(map(len, self.lines))
            self.planted.append({"folder": self.folder.name, "file": self.file, "position": position, "reason": reason})
        text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
        self.lines.append(text.encode() + b"\n")

    def close(self) -> None:
        (self.folder / self.file).write_bytes(b"".join(self.lines))
        print(f"{self.folder}: {len(self.lines)} rows, {self.images} images")


def enlarged(scan: np.ndarray, random: random.Random) -> Image.Image:
    """An 8 x 8 scan (values 0..16) as a picture of 44 to 92 pixels a side."""
    size = random.randint(44, 92), random.randint(44, 92)
    filter = random.choice([Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST])
    return Image.fromarray((scan * 15.9).astype(np.uint8)).resize(size, filter)


def question(image: str, digit: int, random: random.Random) -> dict[str, Any]:
    return conversation([image], "<image>" + random.choice(QUESTIONS), WORDS[digit])


def conversation(images: list[str], *turns: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns)], "images": images}


def messages_rows(out: RawFolder, scans: np.ndarray, digits: np.ndarray, random: random.Random) -> None:
    """Several turns a picture, and now and then two pictures."""
    for n, (scan, digit) in enumerate(zip(scans, digits)):
        image = out.image(enlarged(scan, random), random.choice(["png", "jpg"]))
        row = question(image, digit, random)
        follow_up = [("Is it even or odd?", "odd" if digit % 2 else "even"), ("In figures?", str(digit))]
        for ask, answer in random.sample(follow_up, n % 3):
            row["messages"] += conversation([], ask, answer)["messages"]
        out.row(row)
        if n % 16 == 0:
            other = random.randrange(len(scans))
            second = out.image(enlarged(scans[other], random), "png")
            answer = f"{WORDS[digit]} {WORDS[digits[other]]}"
            out.row(conversation([image, second], "<image><image>Which two digits are these?", answer))


def llava_rows(out: RawFolder, scans: np.ndarray, digits: np.ndarray, random: random.Random) -> None:
    for scan, digit in zip(scans, digits):
        image = out.image(enlarged(scan, random), "png")
        turns = [
            {"from": "human", "value": "<image>\n" + random.choice(QUESTIONS)},
            {"from": "gpt", "value": WORDS[digit]},
        ]
        out.row({"id": image, "image": image, "conversations": turns})


def documents() -> Iterator[str]:
    """Topics of Python's documentation, short enough. Some have two names: each text once."""
    for text in dict.fromkeys(topics[name] for name in sorted(topics)):
        if len(text) <= LONGEST_DOCUMENT:
            yield text


def plant_bad_pictures(out: RawFolder) -> None:
    """One row for each thing that can be wrong with a picture or a conversation."""
    good = Image.new("RGB", (64, 64), "white")

    def plant(image: str, reason: str, text: str = "<image>What is this?", answer: str = "a test picture") -> None:
        out.row(conversation([image], text, answer), reason)

    plant("scans/nowhere.png", "image_missing")
    plant(out.image_bytes(png(good.resize((256, 256)).effect_spread(64))[:-400]), "image_unreadable")
    plant(out.image(good.resize((20, 64)), "png"), "image_too_small")
    plant(out.image(good.resize((28, 5640)), "png"), "image_aspect_ratio")
    plant(out.image_bytes(png(Image.new("1", (20000, 20000)))), "image_too_large")
    good.save(out.folder.parent / "outside.png")
    plant("../outside.png", "image_path_escapes")
    # Decodes, but transformers also reads where the camera's top was, and fails.
    plant(out.image_bytes(png(good, exif=b"Exif\0\0damaged")), "processor_failed")
    plant(out.image(good, "png"), "image_count_mismatch", text="<image><image>Which is larger?")
    plant(out.image(good, "png"), "text_too_short", text="<image>", answer="no")
    out.row('{"messages": [{"role": "user", "content": "cut off in the mid', "malformed_row")
    copy = json.loads(out.lines[0])
    copy["images"] = [out.image_bytes((out.folder / copy["images"][0]).read_bytes(), copy["images"][0][-3:])]
    out.row(copy, "duplicate")


def png(picture: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "png", **options)
    return stream.getvalue()


def main(out: Path) -> None:
    rng = random.Random(0)
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    held_out, validation, train = np.split(order, [HELD_OUT, HELD_OUT + VALIDATION])
    shown = np.tile(train, VARIANTS)
    planted: list[dict[str, Any]] = []

    raw = RawFolder(out / "raw/digits", "train.jsonl", planted)
    messages_rows(raw, bunch.images[shown], bunch.target[shown], rng)
    plant_bad_pictures(raw)
    raw.close()

    raw = RawFolder(out / "raw/digits_llava", "train.jsonl", planted)
    llava_rows(raw, bunch.images[shown], bunch.target[shown], rng)
    raw.close()

    raw = RawFolder(out / "raw/pydoc", "documents.jsonl", planted)
    for text in documents():
        raw.row({"text": text})
    raw.row({"text": max(topics.values(), key=len)}, "too_long")
    raw.close()

    for name, scans in (("validation", validation), ("heldout", held_out)):
        raw = RawFolder(out / name / "digits", "questions.jsonl", [])
        for index in scans:
            image = raw.image(enlarged(bunch.images[index], rng), "png")
            raw.row(question(image, int(bunch.target[index]), rng))
        raw.close()
    (out / "raw/planted.json").write_text(json.dumps(planted, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
