"""Build on one core, of documents and of chats: tokens a second of the stage, of its Python worker, and of its peers.

The text is Python's own library and documentation, under Qwen's vocabulary (PyPI's dashscope): a file a document,
or chats of one to four questions and answers cut from it. The floor is `tokenizers` on texts that are rendered already,
256 at a time as Spark passes them, without threads (TOKENIZERS_PARALLELISM=false); transformers' apply_chat_template
renders and tokenizes the same chats, as a batch. All runs share one core (one_core.py). The best of nine rounds
counts, of a stage the best of three. The Spark session is there before the clock starts; the last column is without a
run's fixed cost, of a stage about 5 s. It takes five minutes on an idle machine, most of them Spark's.

usage: python -m benchmarks.build_text [--bytes N]
"""

import argparse
import json
import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow.dataset
from tokenizers import Tokenizer

from benchmarks.one_core import pin, seconds, show
from pipeline.spark import BATCH_ROWS, spark_session
from pipeline.stages.build import BuildStage, build
from pipeline.stages.filter import FilterStage
from pipeline.stages.preprocess import PreprocessStage
from pipeline.stages.sample import SampleStage
from pipeline.tokenizer_settings import Settings
from tests.support.qwen_assets import real_tokenizer_folder

LENGTH = 1 << 20  # tokens: no row is longer
KINDS = {"documents": "text", "chats": "messages"}  # -> dataset class
ROUNDS, STAGE_ROUNDS = 9, 3
SCALES = (1, 16)
Row = dict[str, Any]


def documents() -> Iterator[Row]:
    library = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    sources = [path for path in library if "site-packages" not in path.parts and "test" not in path.parts]
    texts = [*topics.values(), *(path.read_text(errors="replace") for path in sources)]
    for number, text in enumerate(cycle(filter(str.strip, texts))):
        yield {"text": f"{number}\n{text}"}  # no two are duplicates


def chats() -> Iterator[Row]:
    rng = np.random.default_rng(0)
    corpus = "".join(row["text"] for row, _ in zip(documents(), range(1_000)))
    while True:
        messages = []
        for role, most in [("user", 400), ("assistant", 1_200)] * int(rng.integers(1, 5)):
            start = int(rng.integers(len(corpus) - most))
            messages.append({"role": role, "content": "I" + corpus[start : start + int(rng.integers(20, most))]})
        yield {"messages": messages}


def make(folder: Path, rows: Iterator[Row], size: int) -> list[Row]:
    """Write a raw folder of about `size` bytes of JSON; return its rows."""
    folder.mkdir(parents=True)
    written, made = 0, []
    with open(folder / "rows.jsonl", "w") as stream:
        while written < size:
            made.append(next(rows))
            written += stream.write(json.dumps(made[-1]) + "\n")
    return made


class Work:
    """One scale of one kind: the input of build, and each way to its tokens."""

    def __init__(self, folder: Path, kind: str, size: int, tokenizer: Path):
        self._folder, self._tokenizer = folder, tokenizer
        rows = make(folder / "raw", {"documents": documents, "chats": chats}[kind](), size)
        PreprocessStage(str(folder / "raw"), str(folder / "checked"), KINDS[kind]).run()
        FilterStage(str(folder / "checked"), str(folder / "clean")).run()
        SampleStage(str(folder / "clean"), str(folder / "sampled")).run()
        self._settings = Settings.load(str(tokenizer))
        table = pyarrow.dataset.dataset(str(folder / "sampled" / "data")).to_table()
        self._batches = table.combine_chunks().to_batches(BATCH_ROWS)
        self._backend = Tokenizer.from_str(self._settings.tokenizer_json)
        self._chats = [row["messages"] for row in rows] if kind == "chats" else []
        self._texts = self._apply_chat_template(tokenize=False) if self._chats else [row["text"] for row in rows]
        self.rows = len(rows)
        self.tokens = 0

    def floor(self) -> None:
        """`tokenizers` alone, and its ids as Python lists."""
        self.tokens = 0
        for start in range(0, self.rows, BATCH_ROWS):
            texts = self._texts[start : start + BATCH_ROWS]
            self.tokens += sum(len(e.ids) for e in self._backend.encode_batch(texts, add_special_tokens=False))

    def transformers(self) -> None:
        self._apply_chat_template(tokenize=True)

    def worker(self) -> None:
        """What a Spark task does, Arrow to Arrow."""
        for _ in build(iter(self._batches), self._settings, LENGTH, split=False):
            pass

    def stage(self) -> None:
        BuildStage(str(self._folder / "sampled"), str(self._folder / "built"), str(self._tokenizer), LENGTH).run(True)

    def _apply_chat_template(self, tokenize: bool) -> list[Any]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._tokenizer)
        done: list[Any] = []
        for start in range(0, len(self._chats), BATCH_ROWS):
            batch = self._chats[start : start + BATCH_ROWS]
            done += tokenizer.apply_chat_template(batch, tokenize=tokenize, return_dict=False)
        return done


def measure(kind: str, folder: Path, size: int, tokenizer: Path) -> None:
    works = [Work(folder / f"{kind}-{scale}x", kind, scale * size, tokenizer) for scale in SCALES]
    ways: dict[str, Callable[[Work], None]] = {"tokenizers (floor)": Work.floor}
    if kind == "chats":
        ways["apply_chat_template"] = Work.transformers
    ways |= {"build, Python worker": Work.worker, "build, whole stage": Work.stage}
    for way in ways.values():
        way(works[0])
    best: dict[str, list[float]] = {}
    for number in range(ROUNDS):
        for name, way in ways.items():
            if way is not Work.stage or number < STAGE_ROUNDS:
                taken = [seconds(partial(way, work)) for work in works]
                best[name] = [min(pair) for pair in zip(taken, best.get(name, taken))]
    rows, tokens = [work.rows for work in works], [work.tokens for work in works]
    show(f"tokens, of {rows} {kind}: tokens", tokens, best, scales=SCALES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=200_000, help="of raw rows at 1x")
    args = parser.parse_args()
    pin()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    spark_session()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = real_tokenizer_folder(Path(folder, "tokenizer"), vision=False)
        for kind in KINDS:
            measure(kind, Path(folder), args.bytes, tokenizer)


if __name__ == "__main__":
    main()
