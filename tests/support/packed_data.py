"""Small packed datasets with real encoded images, written by kanyun's own writer."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from kanyun.fingerprint import Fingerprint
from kanyun.manifest import Counts, Manifest
from kanyun.naming import dataset_name
from kanyun.schema import Sample
from kanyun.storage import Folder
from kanyun.writer import ShardWriter, publish
from trainer.data.shapes import PATCH_BUCKETS, shape_buckets

PAD, IMAGE = 900, 901  # token ids; text is below
DATASETS = ("drawn", "made")
MODEL = Fingerprint("the model's", None, {})


def encoded_image(rng: np.random.Generator, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, rng.choice(["JPEG", "PNG"]))
    return buffer.getvalue()


def random_sample(rng: np.random.Generator, sample_id: int, text: int, grids: Sequence[tuple[int, int]] = ()) -> Sample:
    """Return a sample of about `text` text tokens with images in between; grids in patches (rows, columns)."""
    ids: list[int] = rng.integers(0, 900, max(text - len(grids), 1)).tolist()
    for rows, columns in grids:
        ids += [IMAGE] * (rows * columns // 4) + [int(rng.integers(0, 900))]
    trained = rng.random(len(ids)) < 0.6
    trained &= np.array(ids) != IMAGE
    images = [encoded_image(rng, 14 * columns + 3, 14 * rows - 5) for rows, columns in grids]
    thw = [(1, *grid) for grid in grids]
    return Sample(sample_id, "made", 0, 0, np.array(ids, np.int32), trained, thw, images)


def write_packed(
    parent: Path | str,
    packs: Sequence[Sequence[Sample]],
    length: int,
    *,
    part: int = 0,
    epoch: int = 0,
    shards: int = 2,
    tokenizer: str = MODEL.digest,
    ratios: dict[str, str] | None = None,
) -> Manifest:
    """A finished packed dataset below `parent`, the packs dealt over `shards`."""
    folder = Folder(str(parent)) / dataset_name(length, part, epoch)
    results = []
    names = sorted({sample.dataset for pack in packs for sample in pack})
    for index in range(shards):
        with ShardWriter(folder, index, shards, length, PAD, names) as writer:
            for pack in packs[index::shards]:
                writer.add(pack)
        assert writer.result is not None
        results.append(writer.result)
    samples = [sample for pack in packs for sample in pack]
    patches = [sum(int(np.prod(grid)) for sample in pack for grid in sample.image_grid_thw) for pack in packs]
    return publish(
        folder,
        results,
        length=length,
        vision_budget=-(-max(patches, default=0) // 64) * 64,
        part=part,
        epoch=epoch,
        seed=0,
        ratios=ratios or dict.fromkeys(names, "1"),
        counts=Counts(rows_in=len(samples), packed=len(samples)),
        packs_lower_bound=1,
        tokenizer=tokenizer,
        processor=None,
        pad_token_id=PAD,
        image_token_id=IMAGE,
    )


def random_packs(seed: int, count: int, length: int, images: bool = True) -> list[list[Sample]]:
    """Return `count` packs of a few samples: some without images, some with several, some full to the last slot."""
    rng = np.random.default_rng(seed)
    packs: list[list[Sample]] = []
    for number in range(count):
        pack: list[Sample] = []
        free = length
        while free > length // 8 or (number % 5 == 0 and free):
            grids = [] if not images or number % 4 == 0 else _grids(rng)
            sample = random_sample(rng, seed << 32 | number << 8 | len(pack), int(rng.integers(3, 20)), grids)
            if len(sample.input_ids) > free:
                sample = random_sample(rng, sample.sample_id, free)
            pack.append(replace(sample, dataset=DATASETS[len(pack) % len(DATASETS)]))
            free -= len(sample.input_ids)
        packs.append(pack)
    return packs


def _grids(rng: np.random.Generator) -> list[tuple[int, int]]:
    return [(2 * int(h), 2 * int(w)) for h, w in rng.integers(1, 6, (int(rng.integers(0, 3)), 2))]


def many_sizes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, patches) of samples: half are text, the others have up to four pictures of 56 to 1,000 pixels a side."""
    rng = np.random.default_rng(3)
    sides = np.exp(rng.uniform(np.log(56), np.log(1000), (count, 4, 2)))
    pictures = 4 * np.maximum(np.round(sides / 28), 1).prod(2).astype(np.int64)
    patches = (pictures * (np.arange(4) < rng.integers(1, 5, (count, 1)))).sum(1)
    patches[::2] = 0
    return patches // 4 + rng.integers(45, 1225, count), patches


def useful_patches(packs: np.ndarray) -> float:
    """Return the useful share of the patches that packs [n] are padded to in training, one at a time."""
    padded = -(-packs.clip(1) // 64).astype(np.int64) * 64
    sizes = np.array(shape_buckets(padded, PATCH_BUCKETS))
    return float(packs.sum() / sizes[np.searchsorted(sizes, padded)].sum())
