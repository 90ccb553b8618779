"""make_batch against a slow reference that walks token by token, patch by patch."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from kanyun.errors import DatasetError
from kanyun.schema import Pack, Sample
from tests.support.packed_data import IMAGE, PAD, random_packs, random_sample
from trainer.data.batch import Batch, BatchFormat, make_batch
from trainer.data.pixels import decode
from trainer.data.shapes import StaticShape
from trainer.models.qwen2_5.windows import WindowGeometry

LENGTH = 96
VISION = BatchFormat(WindowGeometry(), IMAGE)


def as_pack(pack_id: int, samples: list[Sample], length: int = LENGTH) -> Pack:
    ids, mask, ends = [], [], [0]
    for sample in samples:
        ids += sample.input_ids.tolist()
        mask += sample.loss_mask.tolist()
        ends.append(len(ids))
    if ends[-1] < length:
        ends.append(length)
    return Pack(
        pack_id=pack_id,
        input_ids=np.array(ids + [PAD] * (length - len(ids)), np.int32),
        loss_mask=np.array(mask + [False] * (length - len(mask))),
        cu_seqlens=np.array(ends, np.int32),
        sample_ids=np.array([s.sample_id for s in samples], np.uint64),
        dataset=[s.dataset for s in samples],
        image_grid_thw=np.array([g for s in samples for g in s.image_grid_thw], np.int32).reshape(-1, 3),
        images=[bytes(image) for s in samples for image in s.images],
    )


def slow_segment(sample: Sample, length: int) -> dict[str, list]:
    """Labels, loss mask and positions of one segment, alone."""
    ids, trained = sample.input_ids.tolist(), sample.loss_mask.tolist()
    labels = [*ids[1:], 0]
    mask = [float(t) for t in trained[1:]] + [0.0]
    positions, position, i, grids = [], 0, 0, [g[1:] for g in sample.image_grid_thw]
    while i < len(ids):
        if ids[i] == IMAGE:
            rows, columns = (side // 2 for side in grids.pop(0))
            positions += [(position, position + r, position + c) for r in range(rows) for c in range(columns)]
            position, i = position + max(rows, columns), i + rows * columns
        else:
            positions.append((position, position, position))
            position, i = position + 1, i + 1
    return {"ids": ids, "labels": labels, "mask": mask, "positions": positions}


def slow_image(data: bytes, rows: int, columns: int) -> tuple[list, list, list[int], list[int]]:
    """Patches, positions, window lengths, and which image token each visual token is, in window order."""
    pixels = decode(data, 14 * rows, 14 * columns)
    patches, positions, windows, tokens = [], [], [], []
    for top in range(0, rows, 8):
        for left in range(0, columns, 8):
            before = len(patches)
            for row in range(top, min(top + 8, rows), 2):
                for column in range(left, min(left + 8, columns), 2):
                    tokens.append(row // 2 * (columns // 2) + column // 2)
                    for r, c in ((row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)):
                        patches.append(pixels[:, 14 * r : 14 * r + 14, 14 * c : 14 * c + 14].ravel())
                        positions.append((r, c))
            windows.append(len(patches) - before)
    return patches, positions, windows, tokens


def check(batch: Batch, packs: list[list[Sample]]) -> tuple[int, int, int]:
    """Assert that the used part of a batch is what the samples say; (patches, windows, images) used."""
    ids, labels, mask, positions, ends = [], [], [], [], [0]
    patches, patch_positions, windows, images, token_index = [], [], [0], [0], []
    for number, pack in enumerate(packs):
        for sample in pack:
            start = len(ids)
            slow = slow_segment(sample, LENGTH)
            slots = [start + i for i, token in enumerate(slow["ids"]) if token == IMAGE]
            for data, (_, rows, columns) in zip(sample.images, sample.image_grid_thw, strict=True):
                pixels, places, sizes, tokens = slow_image(data, rows, columns)
                patches += pixels
                patch_positions += places
                windows += [windows[-1] + sum(sizes[: i + 1]) for i in range(len(sizes))]
                images.append(images[-1] + rows * columns)
                token_index += [slots[token] for token in tokens]
                slots = slots[len(tokens) :]
            ids, labels, mask = ids + slow["ids"], labels + slow["labels"], mask + slow["mask"]
            positions += slow["positions"]
            ends.append(len(ids))
        tail = (number + 1) * LENGTH - len(ids)
        if tail:
            ids, labels, mask = ids + [PAD] * tail, labels + [PAD] * (tail - 1) + [0], mask + [0.0] * tail
            positions += [(i, i, i) for i in range(tail)]
            ends.append(len(ids))
    assert batch.input_ids.tolist() == ids
    assert batch.loss_mask.tolist() == mask
    trained = batch.loss_mask.bool()
    assert batch.labels[trained].tolist() == torch.tensor(labels)[trained].tolist()
    assert batch.position_ids.T.tolist() == [list(p) for p in positions]
    assert batch.cu_seqlens[: len(ends)].tolist() == ends
    assert set(batch.cu_seqlens[len(ends) :].tolist()) <= {len(ids)}

    vision, used = batch.vision, len(patches)
    assert vision is not None
    assert (vision.patches[:used].numpy() == np.array(patches, np.uint8).reshape(used, 588)).all()
    assert vision.per_patch["positions"][:used].tolist() == [list(p) for p in patch_positions]
    assert vision.segments["windows"][: len(windows)].tolist() == windows
    assert vision.segments["images"][: len(images)].tolist() == images
    assert vision.token_index[: used // 4].tolist() == token_index
    return used, len(windows) - 1, len(images) - 1


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_equals_the_slow_reference(micro_batch: int) -> None:
    samples = random_packs(seed=1, count=12, length=LENGTH)
    assert any(len(s.images) > 1 for pack in samples for s in pack)
    for start in range(0, 12, micro_batch):
        chosen = samples[start : start + micro_batch]
        batch = make_batch([as_pack(i, pack) for i, pack in enumerate(chosen)], VISION)
        used, windows, images = check(batch, chosen)
        assert batch.vision is not None
        assert len(batch.vision.patches) == max(-(-used // 64), 1) * 64
        padded = len(batch.vision.patches) > used  # a window and an image more
        assert len(batch.vision.segments["windows"]) == windows + 1 + padded
        assert len(batch.vision.segments["images"]) == images + 1 + padded
        dtypes = {f.name: getattr(batch, f.name).dtype for f in fields(Batch) if f.name != "vision"}
        assert dtypes["position_ids"] == dtypes["labels"] == dtypes["input_ids"] == torch.int64
        assert (dtypes["loss_mask"], dtypes["cu_seqlens"]) == (torch.float32, torch.int32)


def test_a_pack_without_images_runs_the_tower_on_one_dummy_window() -> None:
    rng = np.random.default_rng(0)
    vision = make_batch([as_pack(0, [random_sample(rng, 0, 20)])], VISION).vision
    assert vision is not None
    assert vision.patches.shape == (64, 588)
    assert vision.segments["windows"].tolist() == vision.segments["images"].tolist() == [0, 64]
    assert vision.token_index.tolist() == [LENGTH] * 16  # goes nowhere


def test_static_shapes_pad_without_touching_real_images() -> None:
    static = StaticShape(40, (2112,), {"windows": 130, "images": 30})
    form = replace(VISION, static=static)
    for start in range(0, 12, 2):
        chosen = random_packs(seed=2, count=12, length=LENGTH)[start : start + 2]
        batch = make_batch([as_pack(i, pack) for i, pack in enumerate(chosen)], form)
        used, windows, images = check(batch, chosen)
        vision = batch.vision
        assert vision is not None
        assert batch.cu_seqlens.shape == (41,)
        assert vision.patches.shape == (2112, 588)
        assert vision.segments["windows"].shape == (131,)
        assert vision.segments["images"].shape == (31,)
        assert not vision.patches[used:].any()
        assert vision.token_index[used // 4 :].tolist() == [2 * LENGTH] * (528 - used // 4)
        assert used in vision.segments["windows"].tolist()  # padding starts its own windows and images
        assert used in vision.segments["images"].tolist()
        assert vision.segments["windows"][-1] == vision.segments["images"][-1] == 2112
        assert vision.segments["windows"][windows:].diff().max() == 64
        assert vision.segments["images"][images:].diff().max() == 1024


@pytest.mark.parametrize(("sizes", "expected"), [((32, 64, 128), 64), ((32, 96, 128), 96), ((128,), 128)])
def test_patches_are_padded_to_the_next_of_the_sizes(sizes: tuple[int, ...], expected: int) -> None:
    pack = as_pack(0, [random_sample(np.random.default_rng(0), i, 9, [(4, 4)]) for i in range(4)])
    batch = make_batch([pack], replace(VISION, static=StaticShape(9, sizes, {"windows": 9, "images": 9})))
    assert batch.vision is not None
    assert (len(batch.vision.patches), batch.real_patches) == (expected, 64)


def test_static_shape_that_is_too_small_is_refused() -> None:
    pack = as_pack(7, [random_sample(np.random.default_rng(0), i, 9, [(4, 4)]) for i in range(4)])
    enough = {"windows": 9, "images": 9}
    roomy = StaticShape(9, (64,), enough)
    make_batch([pack], replace(VISION, static=roomy))
    for field, value, message in [
        ("segments", 4, "5 segments in one micro-batch, but the layout has room for 4"),
        ("patches", (60,), "64 patches in packs 7, but the layout has room for 60"),
        ("vision", enough | {"windows": 3}, "4 windows in one micro-batch, but the layout has room for 3"),
        ("vision", enough | {"images": 3}, "4 images in one micro-batch, but the layout has room for 3"),
    ]:
        with pytest.raises(DatasetError, match=message):
            make_batch([pack], replace(VISION, static=replace(roomy, **{field: value})))


def test_a_text_model_has_no_vision_and_three_equal_position_rows() -> None:
    samples = random_packs(seed=3, count=1, length=LENGTH, images=False)[0]
    batch = make_batch([as_pack(0, samples)], BatchFormat(None))
    assert batch.vision is None
    expected = [i for s in samples for i in range(len(s.input_ids))]
    expected += list(range(LENGTH - len(expected)))
    assert batch.position_ids.tolist() == [expected] * 3


def test_an_image_that_cannot_be_decoded_names_pack_and_image() -> None:
    sample = random_sample(np.random.default_rng(0), 5, 9, [(4, 4), (2, 6)])
    broken = replace(sample, images=[sample.images[0], sample.images[1][:200]])
    with pytest.raises(DatasetError, match=r"image 1 of pack 4711 \(200 bytes\) cannot be decoded"):
        make_batch([as_pack(4711, [broken])], VISION)


def test_image_tokens_that_do_not_fit_the_grids_name_the_pack() -> None:
    sample = random_sample(np.random.default_rng(0), 5, 9, [(4, 4)])
    with pytest.raises(DatasetError, match=r"pack 12 does not fit the model .4 image tokens, .* need 6"):
        make_batch([as_pack(12, [replace(sample, image_grid_thw=[(1, 4, 6)])])], VISION)
