"""Images as they come from the web: each is taken as transformers sees it, or has a fitting reason."""

from pathlib import Path

import numpy as np
import pytest
from transformers.image_utils import load_image

from pipeline.checks import RowError
from pipeline.images.guard import decoder
from tests.support.image_zoo import BAD, GOOD, encoded, picture
from trainer.data.pixels import decode


@pytest.mark.parametrize("name", GOOD)
def test_what_we_count_is_what_transformers_sees_and_training_decodes(name: str, tmp_path: Path) -> None:
    found = decoder().probe(GOOD[name], name)
    (tmp_path / name).write_bytes(GOOD[name])
    seen = load_image(str(tmp_path / name))
    assert (found.width, found.height) == seen.size
    pixels = decode(GOOD[name], seen.height, seen.width)
    assert (pixels == np.asarray(seen).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_has_its_reason(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(RowError) as caught:
        decoder().probe(data, name)
    assert (str(caught.value.reason), repr(name) in caught.value.evidence) == (reason, True), caught.value.evidence


def outcome(data: bytes) -> str:
    """The reason; or "" if it is taken, and then training must decode it."""
    try:
        found = decoder().probe(data, "a")
    except RowError as error:
        return str(error.reason)
    decode(data, found.height, found.width)
    return ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM"])
def test_wherever_it_is_cut(kind: str) -> None:
    data = encoded(picture(), kind)
    outcomes = [outcome(data[: len(data) * tenth // 10]) for tenth in range(11)]
    assert set(outcomes[:9]) == {"image_unreadable"}
    assert outcomes[10] == ""


def test_bytes_changed_at_random() -> None:
    rng = np.random.default_rng(1)
    process = decoder()._process
    outcomes = []
    for data in GOOD.values():
        for _ in range(6):
            bad = bytearray(data)
            for place in rng.integers(0, len(bad), 4):
                bad[place] = rng.integers(0, 256)
            outcomes.append(outcome(bytes(bad)))
    assert {"", "image_unreadable"} <= set(outcomes)
    assert decoder()._process is process  # none has ended it
