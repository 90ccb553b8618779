"""Build of text on one core: tokens a second of the stage, of its Python work alone, and of `tokenizers` by itself.

The text is Python's own library sources and documentation, a file a document, under Qwen's vocabulary (PyPI's dashscope
has it), on one core (one_core.py). The Spark session is there before the clock starts; a stage's own fixed cost is in
its times, but in the last column. The better of two rounds counts.

usage: python -m benchmarks.build_text [--bytes N]
"""

import argparse
import json
import os
import sysconfig
import tempfile
from functools import partial
from itertools import cycle
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow.dataset
from tokenizers import Tokenizer

from benchmarks.one_core import SCALES, pin, seconds, show
from pipeline.spark import BATCH_ROWS, spark_session
from pipeline.stages.build import BuildStage, build
from pipeline.stages.filter import FilterStage
from pipeline.stages.preprocess import PreprocessStage
from pipeline.stages.sample import SampleStage
from pipeline.tokenizer_settings import Settings
from tests.support.qwen_assets import real_tokenizer_folder

LENGTH = 1 << 20  # tokens: no document is longer


def make(folder: Path, size: int) -> int:
    """A raw folder of about `size` bytes of text; documents."""
    library = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    sources = [path for path in library if "site-packages" not in path.parts and "test" not in path.parts]
    texts = [*topics.values(), *(path.read_text(errors="replace") for path in sources)]
    written = number = 0
    folder.mkdir(parents=True)
    with open(folder / "rows.jsonl", "w") as stream:
        for number, text in enumerate(cycle(filter(str.strip, texts))):
            if written >= size:
                break
            # No two are duplicates.
            written += stream.write(json.dumps({"text": f"{number}\n{text}"}) + "\n")
    return number


class Work:
    """One scale: the input of build, ready, and the three ways to its tokens."""

    def __init__(self, folder: Path, size: int, tokenizer: Path):
        self._folder, self._tokenizer = folder, tokenizer
        self.documents = make(folder / "raw", size)
        PreprocessStage(str(folder / "raw"), str(folder / "checked"), "text").run()
        FilterStage(str(folder / "checked"), str(folder / "clean")).run()
        SampleStage(str(folder / "clean"), str(folder / "sampled")).run()
        self._settings = Settings.load(str(tokenizer))
        self._table = pyarrow.dataset.dataset(str(folder / "sampled" / "data")).to_table()
        self._batches = self._table.combine_chunks().to_batches(BATCH_ROWS)
        self._backend = Tokenizer.from_str(self._settings.tokenizer_json)
        self.tokens = 0

    def alone(self) -> None:
        """The floor: `tokenizers` on lists of strings, as many at a time as Spark gives build."""
        self.tokens = 0
        for batch in self._batches:
            for one in self._backend.encode_batch(batch.column("text").to_pylist(), add_special_tokens=False):
                self.tokens += len(one.ids)

    def worker(self) -> None:
        """What a Spark task does, Arrow to Arrow."""
        for _ in build(iter(self._batches), self._settings, LENGTH, split=False):
            pass

    def stage(self) -> None:
        BuildStage(str(self._folder / "sampled"), str(self._folder / "built"), str(self._tokenizer), LENGTH).run(True)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--bytes", type=int, default=1_000_000, help="of text at 1x")
    args = parser.parse_args()
    pin()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    spark_session()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = real_tokenizer_folder(Path(folder, "tokenizer"), vision=False)
        works = [Work(Path(folder, f"{scale}x"), scale * args.bytes, tokenizer) for scale in SCALES]
        ways = {"tokenizers (floor)": Work.alone, "build, Python work": Work.worker, "build, whole stage": Work.stage}
        for way in ways.values():
            way(works[0])
        rounds = [{name: [seconds(partial(way, work)) for work in works] for name, way in ways.items()} for _ in "12"]
        times = {name: [min(pair) for pair in zip(*(one[name] for one in rounds))] for name in ways}
    tokens = [work.tokens for work in works]
    show(f"tokens, of {[work.documents for work in works]} documents: tokens", tokens, times)


if __name__ == "__main__":
    main()
