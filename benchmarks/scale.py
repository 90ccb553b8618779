"""The formulas of docs/scale.md beside what Spark's own metrics say of the five stages at 1x, 4x and 16x.

Rows are questions about 600 to 1,800 characters of Python's documentation, with one small image in the row (parquet).
Shuffle bytes and tasks come from Spark's event log, a Python worker's memory from the system. The constants in
`formulas` are those of 1x; that they hold at 16x is what is measured.

usage: python -m benchmarks.scale
"""

import io
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from benchmarks.made import write_built
from benchmarks.pack_bytes import worker_memory
from pipeline.reports.report import Report
from pipeline.stages.build import BuildStage
from pipeline.stages.filter import FilterStage
from pipeline.stages.pack import PackStage
from pipeline.stages.preprocess import PreprocessStage
from pipeline.stages.sample import SampleStage
from tests.support.qwen_assets import real_tokenizer_folder

SCALES = {"1x": 1_000, "4x": 4_000, "16x": 16_000}
CHARACTERS, RATIO = (600, 1_800), 0.5
BUCKET_TOKENS = (1_000_000, 4_000_000, 16_000_000)


def formulas(rows: int, sampled: int, row_bytes: float, tokens: int) -> dict[str, float]:
    """Shuffle bytes of each stage. row_bytes: of a row of text as raw JSON; tokens: of all samples that are packed."""
    return {
        "preprocess": 0.0,  # but for its counts
        "filter": (31.0 + 172.0) * rows,  # hash, place and count of each content; an image: four keys, place, digest
        "sample": 0.875 * row_bytes * rows,  # whole rows, where a ratio is no whole number: text, raw and refs, lz4
        "build": 0.0,
        "pack": 2.25 * tokens + 120.0 * sampled,  # 4 + 1 bytes a token before lz4, and the refs
    }


@dataclass(frozen=True)
class Metrics:
    tasks: int
    shuffle: int  # bytes written
    execution: int  # bytes, the most that one task took of Spark's execution memory


def metrics(lines: list[str]) -> Metrics:
    ended = [e["Task Metrics"] for e in map(json.loads, lines) if e["Event"] == "SparkListenerTaskEnd"]
    return Metrics(
        tasks=len(ended),
        shuffle=sum(m["Shuffle Write Metrics"]["Shuffle Bytes Written"] for m in ended),
        execution=max(m["Peak Execution Memory"] for m in ended),
    )


def write_raw(folder: Path, rows: int) -> float:
    """Conversations in parquet; the mean bytes of a row's text as JSON."""
    rng = np.random.default_rng(rows)
    corpus = "\n".join(topics.values())
    folder.mkdir(parents=True)
    size = 0
    for start in range(0, rows, 1_000):
        made = []
        for number in range(start, start + 1_000):
            place, length = int(rng.integers(len(corpus) - CHARACTERS[1])), int(rng.integers(*CHARACTERS))
            text = f"<image> {number} {corpus[place : place + length]}"
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"answer {number}"}]
            made.append({"messages": messages, "images": [_picture(rng)]})
            size += len(json.dumps(messages))
        pq.write_table(pa.Table.from_pylist(made), folder / f"part-{start:06}.parquet")
    return size / rows


def _picture(rng: np.random.Generator) -> bytes:
    """A JPEG of 64 x 64 pixels, 3 kB, unlike the others."""
    encoded = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((64, 64)).save(encoded, "JPEG")
    return encoded.getvalue()


def main(folder: Path) -> None:
    os.environ["SPARK_MASTER"] = "local[2]"
    logs = folder / "events"
    logs.mkdir()
    settings = {"enabled": "true", "dir": logs.as_uri(), "compress": "false", "rolling.enabled": "false"}
    options = [f"--conf spark.eventLog.{key}={value}" for key, value in settings.items()]
    os.environ["PYSPARK_SUBMIT_ARGS"] = f"{' '.join(options)} pyspark-shell"
    tokenizer = str(real_tokenizer_folder(folder / "tokenizer"))
    (folder / "ratios.yaml").write_text(yaml.safe_dump({"made": RATIO}))
    read = 0  # lines of the event log
    print(
        "| rows | stage | tasks | shuffle, measured | formula | measured / formula | execution memory | Python worker |"
    )
    print("|--:|---|--:|--:|--:|--:|--:|--:|")
    for name, rows in SCALES.items():
        at = {stage: str(folder / name / stage) for stage in ("raw", "preprocess", "filter", "sample", "build", "pack")}
        row_bytes = write_raw(Path(at["raw"]), rows)
        done: dict[str, tuple[Report, Metrics, int]] = {}
        for stage in (
            PreprocessStage(at["raw"], at["preprocess"], "messages"),
            FilterStage(at["preprocess"], f"{at['filter']}/made"),
            SampleStage(at["filter"], at["sample"], ratios=str(folder / "ratios.yaml")),
            BuildStage(at["sample"], at["build"], tokenizer, 8192),
            PackStage(at["build"], at["pack"], 8192),
        ):
            with worker_memory() as memory:
                report = stage.run()
            time.sleep(2)  # the log is a little behind
            lines = next(logs.iterdir()).read_text().splitlines()
            done[stage.name] = report, metrics(lines[read:]), memory["peak"]
            read = len(lines)
        packed = done["pack"][0]
        wanted = formulas(rows, packed.counts.rows_out, row_bytes, packed.facts["tokens"])
        for stage_name, (_, seen, peak) in done.items():
            formula = wanted[stage_name]
            ratio = f"{formula / 1e6:.2f} MB | {seen.shuffle / formula:.2f}" if formula else "counts only | "
            print(
                f"| {rows:,} | {stage_name} | {seen.tasks} | {seen.shuffle / 1e6:.3f} MB | {ratio} "
                f"| {seen.execution / 1e6:.1f} MB | {peak / 1e6:,.0f} MB |",
                flush=True,
            )

    print("\n| tokens of a bucket | Python worker, peak | more than the first, a token |\n|--:|--:|--:|")
    peaks = []
    for tokens in BUCKET_TOKENS:
        built = folder / f"bucket-{tokens}"
        write_built(built, tokens // 210, 8192, images=False)  # of 20 to 400 tokens
        with worker_memory() as memory:
            PackStage.below(str(built), str(folder / f"packed-{tokens}"), 8192).run()
        peaks.append(memory["peak"])
        each = f"{(peaks[-1] - peaks[0]) / (tokens - BUCKET_TOKENS[0]):.1f} B" if len(peaks) > 1 else ""
        print(f"| {tokens:,} | {peaks[-1] / 1e6:,.0f} MB | {each} |", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
