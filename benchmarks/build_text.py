"""Build on one core, of documents and of chats: tokens a CPU second of the stage, of its Python code, and of its peers.

The text is Python's own library and documentation, under Qwen's vocabulary (PyPI's dashscope): a file a document,
or chats of one to four questions and answers cut from it. The floor is `tokenizers` on texts that are rendered already,
without threads (TOKENIZERS_PARALLELISM=false) and with its default cache; transformers' apply_chat_template renders and
tokenizes the same chats, as a batch. These two and the stage's Python code, Arrow to Arrow, take each batch of
BATCH_ROWS rows in turn, so that what else runs on the machine slows all of them. Of each the median of ROUNDS rounds
counts, each with tokenizers that have seen no text.

The stage runs in one Spark session on one core (one_core.py), over --bytes of raw rows and over a sixteenth of them:
of each the best of STAGE_ROUNDS, after a run that warms the JVM up. What the larger one takes beyond the smaller is the
rate. It is CPU time of the JVM (rows from and to parquet, to Python and back, on disk between two writes) and of
Python. The rest is fixed cost: a plan, counts, a report, the vocabulary. It takes five minutes on an idle machine.

usage: python -m benchmarks.build_text [--bytes N]
"""

import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from benchmarks.one_core import pin
from kanyun.cli.parser import Parser
from pipeline.encoder import Encoder
from pipeline.spark import BATCH_ROWS, spark_session
from pipeline.stages.build import BuildStage, build_batch
from pipeline.stages.filter import FilterStage
from pipeline.stages.preprocess import PreprocessStage
from pipeline.stages.sample import SampleStage
from pipeline.tokenizer_settings import Settings
from tests.support.qwen_assets import real_tokenizer_folder

LENGTH = 1 << 20  # tokens: no row is longer
KINDS = {"documents": "text", "chats": "messages"}  # -> dataset class
ROUNDS, STAGE_ROUNDS = 3, 3
FLOOR, PEER, WORKER = "tokenizers (floor)", "apply_chat_template", "build, Python worker"
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


def make(folder: Path, rows: Iterator[Row], size: int) -> int:
    """Write a raw folder of about `size` bytes of JSON; return its number of rows."""
    folder.mkdir(parents=True)
    written = count = 0
    with open(folder / "rows.jsonl", "w") as stream:
        while written < size:
            written += stream.write(json.dumps(next(rows)) + "\n")
            count += 1
    return count


class Work:
    """One size of one kind: the input of build, and each way to its tokens."""

    def __init__(self, folder: Path, kind: str, size: int, tokenizer: Path):
        self._folder, self._tokenizer = folder, tokenizer
        self.rows = make(folder / "raw", {"documents": documents, "chats": chats}[kind](), size)
        PreprocessStage(str(folder / "raw"), str(folder / "checked"), KINDS[kind]).run()
        FilterStage(str(folder / "checked"), str(folder / "clean")).run()
        SampleStage(str(folder / "clean"), str(folder / "sampled")).run()

    def in_turn(self) -> tuple[int, dict[str, float]]:
        """Return the tokens of `tokenizers`, and the CPU seconds of each way but the stage, over all batches."""
        settings = Settings.load(str(self._tokenizer))
        floor = Tokenizer.from_str(settings.tokenizer_json)
        peer = AutoTokenizer.from_pretrained(self._tokenizer)
        encoder = Encoder(settings)
        tokens, taken = 0, dict.fromkeys((FLOOR, PEER, WORKER), 0.0)
        for batch in self._batches():
            messages = batch.column("messages").to_pylist()
            texts: list[str] = batch.column("text").to_pylist()
            if has_chats := messages[0] is not None:
                plain = [
                    [{"role": one["role"], "content": one["content"][0]["text"]} for one in row] for row in messages
                ]
                texts = peer.apply_chat_template(plain, tokenize=False)
            start = time.process_time()
            tokens += sum(len(one.ids) for one in floor.encode_batch(texts, add_special_tokens=False))
            taken[FLOOR] += time.process_time() - start
            if has_chats:
                start = time.process_time()
                peer.apply_chat_template(plain, tokenize=True, return_dict=False)
                taken[PEER] += time.process_time() - start
            start = time.process_time()
            build_batch(batch, encoder, LENGTH, split=False)
            taken[WORKER] += time.process_time() - start
        return tokens, {way: seconds for way, seconds in taken.items() if seconds}

    def stage(self) -> tuple[float, float]:
        """Return CPU seconds of (the JVM, Python)."""
        jvm, python = _spent()
        BuildStage(str(self._folder / "sampled"), str(self._folder / "built"), str(self._tokenizer), LENGTH).run(True)
        return _spent()[0] - jvm, _spent()[1] - python

    def _batches(self) -> list[pa.RecordBatch]:
        table = pyarrow.dataset.dataset(str(self._folder / "sampled" / "data")).to_table()
        return table.combine_chunks().to_batches(BATCH_ROWS)


def _spent() -> tuple[float, float]:
    """CPU seconds so far of (the JVM, this process and Spark's Python workers)."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [(process.name() == "java", process.cpu_times()) for process in processes]
    jvm, python = (sum(t.user + t.system for is_java, t in times if is_java is one) for one in (True, False))
    return jvm, python


def measure(kind: str, folder: Path, size: int, tokenizer: Path) -> None:
    small, large = (Work(folder / f"{kind}-{n}", kind, n, tokenizer) for n in (size // 16, size))
    rounds = [large.in_turn() for _ in range(ROUNDS)]
    tokens = rounds[0][0]
    rates = {way: tokens / median(taken[way] for _, taken in rounds) for way in rounds[0][1]}
    small.stage()
    costs = [[work.stage() for work in (small, large)] for _ in range(STAGE_ROUNDS)]
    least, most = (min((pair[n] for pair in costs), key=sum) for n in (0, 1))
    more = small.in_turn()[0]
    jvm, python = (b - a for a, b in zip(least, most))
    rates["build, whole stage"] = (tokens - more) / (jvm + python)
    print(f"{kind}: {large.rows:,} rows, {tokens:,} tokens, per CPU second of one core")
    for way, rate in rates.items():
        print(f"  {way:24}{rate:10,.0f} = {rate / rates[FLOOR]:4.0%} of the floor")
    share = more / tokens
    fixed = [a - share / (1 - share) * (b - a) for a, b in zip(least, most)]
    print(f"  the stage beyond its fixed cost ({fixed[0]:.1f} s of the JVM, {fixed[1]:.1f} s of Python): ", end="")
    print(f"{jvm:.2f} s of the JVM and {python:.2f} s of Python")


def main() -> None:
    parser = Parser(description=__doc__, example="python -m benchmarks.build_text --bytes 2000000")
    parser.add_argument("--bytes", type=int, default=8_000_000, help="of raw rows")
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
