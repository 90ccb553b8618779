"""How a task of pack reads images from blobs: few reads, and no more memory than the images take."""

from pathlib import Path

import numpy as np
import pytest
import xxhash

from kanyun.errors import DatasetError
from kanyun.storage import Folder
from kanyun.storage.streams import Ranges
from pipeline.images.blobs import short_digest
from pipeline.stages.shard import GAP_BYTES, READ_BYTES, ImageRef, ranges, read_images

SIZE, COUNT = 3_000, 400


def opened(uri: str) -> Ranges:
    folder, _, name = uri.rpartition("/")
    return Folder(folder).ranges(name)


def blob_of(folder: Path) -> list[ImageRef]:
    """Write a blob of COUNT pictures of SIZE bytes; return their refs."""
    data = np.random.default_rng(0).bytes(SIZE * COUNT)
    (folder / "a.blob").write_bytes(data)
    pictures = [(start, data[start : start + SIZE]) for start in range(0, len(data), SIZE)]
    return [
        ImageRef((folder / "a.blob").as_uri(), at, SIZE, short_digest(xxhash.xxh3_128_digest(image)))
        for at, image in pictures
    ]


@pytest.mark.parametrize(("step", "held"), [(1, SIZE * COUNT), (2, SIZE * (COUNT - 1)), (3, SIZE), (20, SIZE)])
def test_pictures_far_apart_do_not_keep_what_lies_between_them(step: int, held: int, tmp_path: Path) -> None:
    refs = blob_of(tmp_path)[::step]
    assert SIZE * (step - 1) <= GAP_BYTES
    (group,) = ranges(refs)
    images = read_images(group, opened)
    whole = (tmp_path / "a.blob").read_bytes()
    assert {ref: bytes(image) for ref, image in images.items()} == {
        ref: whole[ref.offset : ref.offset + SIZE] for ref in refs
    }
    assert {len(image.obj) for image in images.values()} == {held}


def test_reads_are_neither_long_nor_over_wide_gaps() -> None:
    def ref(offset: int, size: int = SIZE) -> ImageRef:
        return ImageRef("a.blob", offset, size, 0)

    near, far = ref(SIZE + GAP_BYTES), ref(2 * SIZE + 2 * GAP_BYTES + 1)
    assert ranges([far, near, ref(0)]) == [[ref(0), near], [far]]
    half = READ_BYTES // 2
    assert ranges([ref(0, half), ref(half, half), ref(2 * half, 1)]) == [
        [ref(0, half), ref(half, half)],
        [ref(2 * half, 1)],
    ]


def test_a_changed_blob_is_told(tmp_path: Path) -> None:
    refs = blob_of(tmp_path)[:2]
    with pytest.raises(DatasetError, match=r"a\.blob was changed after preprocess"):
        read_images([refs[0], refs[1]._replace(digest=7)], opened)
