"""Preprocess on one core: images a second of the stage, of Pillow alone, and of `datasets.map` + Qwen's processor.

All run on the same JPEGs on one core (one_core.py). The Spark session is there before the clock starts; a stage's own
fixed cost (plan, counts, report) is in its times, but in the last column.

The peer needs packages that the project does not install, and is skipped without them:
    pip install --no-deps --target /tmp/peers datasets multiprocess dill

usage: python -m benchmarks.preprocess [--peers DIR] [--images N]
"""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.one_core import SCALES, pin, seconds, show
from kanyun.cli.parser import Parser
from kanyun.storage import Folder
from pipeline.reports.report import Report
from pipeline.spark import spark_session
from pipeline.stages.preprocess import PreprocessStage

Run = Callable[[Path], None]  # works on the raw folder


def make(folder: Path, count: int) -> None:
    """Write JPEGs of 300-1400 pixels a side, about 130 kB: smooth areas, edges and noise as in a photograph."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for number in range(count):
        width, height = (int(side) for side in rng.integers(300, 1401, 2))
        areas = Image.fromarray(rng.integers(0, 256, (height // 60 + 2, width // 60 + 2, 3), np.uint8))
        smooth = np.asarray(areas.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        grain = rng.normal(0, 7, (height, width, 1)).astype(np.float32)
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=80)
        turns = [
            {"role": "user", "content": "<image>What is it?"},
            {"role": "assistant", "content": f"Number {number}."},
        ]
        rows.append(json.dumps({"messages": turns, "images": [f"{number}.jpg"]}) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))


def names(raw: Path) -> list[str]:
    return [str(path) for path in sorted(raw.glob("*.jpg"))]


def bare(raw: Path) -> None:
    """Decode with Pillow alone: the floor."""
    for name in names(raw):
        with Image.open(name) as image:
            image.convert("RGB").load()


def ours(raw: Path) -> None:
    out = raw.parent / f"{raw.name}-out"
    PreprocessStage(str(raw), str(out), "messages").run(overwrite=True)
    counts = Report.load(Folder(str(out)), "preprocess")
    assert not counts.reasons, counts.reasons


def peer(peers: str) -> Run | None:
    sys.path.append(peers)
    try:
        import datasets
    except ImportError:
        return None
    import torch
    from transformers import Qwen2VLImageProcessor

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    processor = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)

    def work(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch["image"]]
        made = processor(images=images, return_tensors="np")
        patches = np.split(made["pixel_values"], np.cumsum(made["image_grid_thw"].prod(1))[:-1])
        return {"pixel_values": patches, "image_grid_thw": made["image_grid_thw"]}

    def run(raw: Path) -> None:
        rows = datasets.Dataset.from_dict({"image": names(raw)}).cast_column("image", datasets.Image())
        cache = str(raw.parent / f"{raw.name}-map.arrow")
        rows.map(work, batched=True, batch_size=8, remove_columns=["image"], cache_file_name=cache, writer_batch_size=8)
        Path(cache).unlink()

    return run


def main() -> None:
    parser = Parser(description=__doc__, example="python -m benchmarks.preprocess --images 200")
    parser.add_argument("--peers", default="/tmp/peers")
    parser.add_argument("--images", type=int, default=100, help="at 1x")
    args = parser.parse_args()
    pin()
    runs: dict[str, Callable[[Path], None]] = {"Pillow alone (floor)": bare, "preprocess": ours}
    if (theirs := peer(args.peers)) is not None:
        runs["datasets.map + Qwen"] = theirs
    counts = [scale * args.images for scale in SCALES]
    with tempfile.TemporaryDirectory() as folder:
        raws = [Path(folder, f"{scale}x") for scale in SCALES]
        for raw, count in zip(raws, counts):
            make(raw, count)
        kilobytes = sum(path.stat().st_size for path in raws[-1].glob("*.jpg")) / counts[-1] / 1e3
        make(Path(folder, "warm"), 4)
        spark_session()
        times = {}
        for name, run in runs.items():
            run(Path(folder, "warm"))
            times[name] = [seconds(partial(run, raw)) for raw in raws]
    show(f"JPEGs of {kilobytes:.0f} kB: images", counts, times)


if __name__ == "__main__":
    main()
