"""Images a second and a core: ours, from encoded bytes to patches in window order, against its floor.

usage: python benchmarks/load_images.py DATA
DATA is what vision_data.py wrote. The floor is the bare decoder and, where the size is another, the bare resize, each
with its output thrown away. Ours is trainer.data.pixels.write_patches: it turns the picture as EXIF says, makes it RGB
and cuts it into patches besides. Both on one core, in CPU time; then the loader's threads on all cores, by the clock.
"""

import io
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.train_text import LENGTH
from benchmarks.vision_data import crop, pictures
from kanyun.cli.parser import Parser
from kanyun.fingerprint import fingerprint
from kanyun.storage import Folder
from trainer.data.batch import BatchFormat
from trainer.data.loader import _threads
from trainer.data.pixels import write_patches
from trainer.data.source import PackedData
from trainer.data.stream import PackStream
from trainer.models.config import ModelConfig
from trainer.models.qwen2_5.windows import WindowGeometry

GEOMETRY = WindowGeometry()
COUNT = 40
ROUNDS = 5
CASES = {  # width, height as encoded, format; all are resized to 784 x 784
    "784 x 784 JPEG, no resize": (784, 784, "JPEG"),
    "1200 x 900 JPEG": (1200, 900, "JPEG"),
    "640 x 427 JPEG": (640, 427, "JPEG"),
    "1200 x 900 WebP": (1200, 900, "WEBP"),
    "640 x 427 PNG": (640, 427, "PNG"),
}
GRID = (56, 56)


def floor(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        pixels = torch.from_numpy(np.array(image))
    if pixels.shape[:2] != (784, 784):
        F.interpolate(pixels.permute(2, 0, 1)[None], (784, 784), mode="bicubic", antialias=True)


def ours(data: bytes, out: np.ndarray) -> None:
    write_patches(out, data, GRID, GEOMETRY)


def a_second(works: list[Callable[[bytes], None]], images: list[bytes]) -> list[float]:
    """Images a second of CPU time of each, the best of ROUNDS, in turn."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, taken in zip(works, times):
            begun = time.process_time()
            for data in images:
                work(data)
            taken.append(time.process_time() - begun)
    return [len(images) / min(taken) for taken in times]


def loader(data: Path, row: str, steps: int = 24) -> float:
    """Images a second of PackStream on all cores."""
    model = str(data / "model")
    packs = PackedData(f"{data}/packed/{row}", LENGTH, fingerprint(Folder(model)))
    with PackStream(packs, BatchFormat.of(ModelConfig.from_hf(model)), seed=0, global_batch=1, micro_batch=1) as stream:
        batches = stream.batches(0)
        next(batches)
        begun = time.perf_counter()
        images = sum(len(batch.vision.segments["images"]) - 1 for (batch,) in islice(batches, steps) if batch.vision)
        return images / (time.perf_counter() - begun)


def main(data: Path) -> None:
    torch.set_num_threads(1)
    rng, sources, out = np.random.default_rng(0), pictures(), np.empty((56 * 56, GEOMETRY.pixels), np.uint8)
    print(f"{'one core':28} {'floor/s':>8} {'ours/s':>8} {'share':>6}")
    for name, (width, height, kind) in CASES.items():
        images = [crop(sources, rng, width, height, kind) for _ in range(COUNT)]
        bare, mine = a_second([floor, lambda data: ours(data, out)], images)
        print(f"{name:28} {bare:8.0f} {mine:8.0f} {mine / bare:6.0%}")
    for row in ("6", "mix"):
        print(f"loader, {row}: {loader(data, row):.0f} images/s by {_threads()} threads")


if __name__ == "__main__":
    parser = Parser(description=__doc__, example="python benchmarks/load_images.py DATA")
    parser.add_argument("data", type=Path)
    main(parser.parse_args().data)
