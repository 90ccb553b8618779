"""Real pictures and text as packs, for train_vision.py and load_images.py, through the real pipeline.

usage: python benchmarks/vision_data.py OUT [PACKS] [FAMILY]   writes OUT/model and OUT/packed/{2,4,6,mix}; 16 packs

FAMILY: qwen2_5_vl, or qwen3_vl; OUT/model is the folder of Qwen2.5-VL-3B or Qwen3-VL-4B without weights. Pictures are
crops of those that scikit-learn ships (and scikit-image and matplotlib, where they are installed), encoded anew; text
is Python's documentation and library. A pack of 2, 4 or 6 has as many pictures of 784 x 784 (Qwen3-VL: 768 x 768), each
with as much text as fills its share of the pack. The mix (three times as many packs) has pictures of many sizes and
forms, in JPEG, PNG and WebP, in conversations with one, several and none. Needs the pipeline (Spark) and PyPI's
dashscope, which ships the vocabulary: run it on a CPU machine and copy OUT.
"""

import importlib.util
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from benchmarks.text_data import LENGTH, documents
from benchmarks.vision_models import FAMILIES, SIZES, hf_config
from kanyun.cli.parser import Parser
from kanyun.fingerprint import fingerprint
from kanyun.storage import Folder
from kanyun.vision import grid_thw, image_tokens
from pipeline.recipe import Recipe, RecipeDataset
from tests.support.qwen3_vl_assets import qwen3_vl_tokenizer_folder
from tests.support.qwen_assets import real_tokenizer_folder

TOKENIZERS = {"qwen2_5_vl": real_tokenizer_folder, "qwen3_vl": qwen3_vl_tokenizer_folder}
PICTURES = {"sklearn": "datasets/images", "skimage": "data", "matplotlib": "mpl-data/sample_data"}
QUESTION = "What do you see, and what do you know of it?"
TURNS = (  # of the chat template
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|vision_end|>"
    f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
)


def pictures() -> list[Image.Image]:
    """Return every picture of at least 300 x 300 pixels."""
    found = []
    for package, below in PICTURES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for path in sorted((Path(spec.origin).parent / below).glob("*.[jp][pn]g")):
            with Image.open(path) as image:
                if min(image.size) >= 300:
                    found.append(image.convert("RGB"))
    return found


def crop(sources: list[Image.Image], rng: np.random.Generator, width: int, height: int, kind: str) -> bytes:
    """Return a random part of a random picture, of this aspect ratio, resized to width x height."""
    source = sources[int(rng.integers(len(sources)))]
    scale = min(source.width / width, source.height / height) * rng.uniform(0.5, 1)
    w, h = max(1, int(width * scale)), max(1, int(height * scale))
    left, top = int(rng.integers(source.width - w + 1)), int(rng.integers(source.height - h + 1))
    part = source.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    stream = io.BytesIO()
    part.save(stream, kind, **({} if kind == "PNG" else {"quality": 60}))
    return stream.getvalue()


class Text:
    """An endless text, in pieces of a given number of tokens."""

    def __init__(self, model: Path):
        self._tokenizer: Any = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._ids = [token for text in documents(3_000_000) for token in self._tokenizer.encode(text).ids]
        self._at = 0

    def take(self, count: int) -> str:
        """Return text of `count` tokens, or a few less: a text cut at a token may be tokenized in another way."""
        if self._at + count > len(self._ids):
            self._at = 0
        text: str = self._tokenizer.decode(self._ids[self._at : self._at + count])
        self._at += count
        while (over := self.tokens(text) - count) > 0:
            text = self._tokenizer.decode(self._tokenizer.encode(text).ids[:-over])
        return text.strip() or "Nothing."

    def tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text).ids)


def row(images: list[str], answer: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": "<image>" * len(images) + QUESTION},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "images": images}


def equal_rows(
    raw: Path, each: int, packs: int, sources: list[Image.Image], text: Text, side: int, tokens: int
) -> Iterator[dict[str, Any]]:
    """Samples of one picture of `side` pixels and `tokens`, `each` of which fill a pack."""
    rng = np.random.default_rng(each)
    around = text.tokens(TURNS) + tokens  # besides the answer
    for number in range(each * packs):
        name = f"{number}.jpg"
        (raw / name).write_bytes(crop(sources, rng, side, side, "JPEG"))
        yield row([name], text.take(LENGTH // each - around - 2))  # 2: the answer's ends may cut otherwise


def mixed_rows(raw: Path, packs: int, sources: list[Image.Image], text: Text) -> Iterator[dict[str, Any]]:
    """Half with pictures of 56 to 1,000 pixels a side, up to 4 of them; about 900 tokens each."""
    rng = np.random.default_rng(0)
    for number in range(9 * 3 * packs):
        names = []
        for place in range(int(rng.integers(1, 5)) if number % 2 else 0):
            width, height = np.exp(rng.uniform(np.log(56), np.log(1000), 2)).astype(int).tolist()
            kind = str(rng.choice(["JPEG", "WEBP", "PNG"], p=[0.7, 0.2, 0.1])) if width * height < 200_000 else "JPEG"
            names.append(f"{number}_{place}.{kind.lower()}")
            (raw / names[-1]).write_bytes(crop(sources, rng, width, height, kind))
        yield row(names, text.take(int(rng.integers(20, 1_200))))


def write(out: Path, name: str, packs: int, sources: list[Image.Image], text: Text, side: int) -> None:
    """OUT/packed/NAME, the parent of a packed folder."""
    processor = fingerprint(Folder(str(out / "model"))).processor
    assert processor is not None
    tokens = image_tokens(grid_thw(side, side, processor), processor["merge_size"])
    work = out / "work"
    raw = work / "raw"
    raw.mkdir(parents=True)
    made = raw, packs, sources, text
    rows = mixed_rows(*made) if name == "mix" else equal_rows(raw, int(name), *made[1:], side, tokens)
    with (raw / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)
    datasets = {name: RecipeDataset(str(raw), "messages")}
    Recipe(str(work / "stages"), str(out / "model"), LENGTH, datasets).run(overwrite=True)
    shutil.move(work / "stages" / "packed", out / "packed" / name)
    for copy in (out / "packed" / name).glob("*/tokenizer"):
        shutil.rmtree(copy)  # 11 MB; OUT/model has it
    shutil.rmtree(work)


def main(out: Path, packs: int, family: str) -> None:
    model = TOKENIZERS[family](out / "model")
    (model / "config.json").write_text(json.dumps(hf_config(SIZES[FAMILIES[family].size]), indent=2))
    (out / "packed").mkdir()
    sources, text = pictures(), Text(model)
    print(f"{len(sources)} pictures")
    for name in ("2", "4", "6", "mix"):
        write(out, name, packs, sources, text, FAMILIES[family].side)


if __name__ == "__main__":
    parser = Parser(description=__doc__, example="python benchmarks/vision_data.py OUT 16 qwen3_vl")
    parser.add_argument("out", type=Path)
    parser.add_argument("packs", type=int, nargs="?", default=16)
    parser.add_argument("family", nargs="?", default="qwen2_5_vl", choices=FAMILIES)
    args = parser.parse_args()
    main(args.out.resolve(), args.packs, args.family)
