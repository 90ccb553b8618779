"""A raw folder of conversations, some with images, as a team brings it."""

import json
import random
from pathlib import Path

from PIL import Image

ROWS_A_FILE, FILES = 40, 3


def raw_files(seed: int = 4) -> dict[str, str]:
    """jsonl files by name: conversations with and without an image; a row of each file has an image that is missing."""
    rng = random.Random(seed)
    files = {}
    for file in range(FILES):
        lines = []
        for number in range(ROWS_A_FILE):
            words = " ".join(rng.choices(["what", "is", "naïve", "你好", "?"], k=rng.randint(3, 30)))
            name = f"images/{rng.randrange(12)}.png" if number else "images/none.png"
            marker, images = ("<image>\n", [name]) if number % 2 == 0 else ("", [])
            answer = {"role": "assistant", "content": f"answer {file} {number}"}
            lines.append({"messages": [{"role": "user", "content": marker + words}, answer], "images": images})
        files[f"part-{file}.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines)
    return files


def write_raw(folder: Path, names: list[str]) -> None:
    """The raw folder, its files created in the order of `names`."""
    rng = random.Random(6)
    (folder / "images").mkdir(parents=True)
    pictures = {n: ((rng.randint(28, 150), rng.randint(28, 150)), tuple(rng.randbytes(3))) for n in range(12)}
    for n in sorted(pictures, reverse=names != sorted(names)):
        Image.new("RGB", *pictures[n]).save(folder / f"images/{n}.png")
    files = raw_files()
    for name in names:
        (folder / name).write_text(files[name])
