"""Packs of samples with images, for golden tests of the vision tower on a CPU and on a GPU."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.support.model_golden import Example
from trainer.data.batch import Batch
from trainer.models.qwen2_5.vision import Tower

LENGTH = 640


def picture(width: int, height: int) -> bytes:
    rng = np.random.default_rng(width * height)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def example(processor: Any, text: str, *sizes: tuple[int, int]) -> Example:
    """A sample with one image of each size (width, height), after and before text; its last half is trained."""
    images = [picture(*size) for size in sizes]
    prompt = "".join(f"Picture {n}: <|vision_start|><|image_pad|><|vision_end|>\n" for n in range(len(sizes))) + text
    opened = [Image.open(io.BytesIO(image)) for image in images]
    processed = dict(processor(text=[prompt], images=opened or None, return_tensors="pt"))
    input_ids = processed.pop("input_ids")[0]
    del processed["attention_mask"]
    grids = processed["image_grid_thw"].tolist() if sizes else []
    trained = torch.arange(len(input_ids)) >= len(input_ids) // 2
    return Example(input_ids, trained, processed, images, grids)


# Sizes: the smallest (one visual token), the largest (256 of them), odd ones, thin ones (200 to 1), one window exactly,
# windows cut off at the borders.
PACKS: dict[str, list[list[tuple[Any, ...]]]] = {  # name -> packs of samples: text, then the sizes of its images
    "no image": [[("The quick brown fox.",), ("jumps over the lazy dog, again and again.",)]],
    "one image": [[("What is this?", (112, 112))]],
    "odd sizes": [[("Compare.", (56, 56), (301, 117)), ("Only text here.",), ("And?", (29, 411), (173, 90), (60, 61))]],
    "image first and last": [[("", (200, 140)), ("x", (140, 200))]],
    "smallest and thinnest": [[("Dot.", (28, 28)), ("Line.", (28, 5600)), ("Text.",), ("Both.", (5000, 30), (28, 28))]],
    "largest": [[("Big.", (512, 512)), ("Shrunk.", (1000, 300))]],
    "two packs": [[("One.", (150, 260))], [("Nothing.",), ("Two.", (260, 150))]],
}


def kept(tower: Tower, batch: Batch) -> float:
    """Values that the tower keeps for its backward pass, its weights aside; in units of a hidden state."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in tower.parameters()}
    found: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            found.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        tower(batch.vision)
    assert batch.vision is not None
    hidden_size: Any = tower.config.hidden_size
    return sum(found) / len(batch.vision.patches) / int(hidden_size)
