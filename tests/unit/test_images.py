import base64
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image, PngImagePlugin
from transformers.image_utils import load_image

from kanyun.storage import Folder
from pipeline.checks import RowError
from pipeline.images import blobs
from pipeline.images.blobs import CopiedImage, ImageCopier, thumbnail
from pipeline.images.guard import decoder
from pipeline.readers import RawRow
from pipeline.stages.preprocess import SampleMaker


def encoded(width: int, height: int, kind: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(data, kind, **options)
    return data.getvalue()


def bomb() -> bytes:
    """A PNG whose header says 20,000 x 20,000 pixels, in 100 bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def wordy_png() -> bytes:
    """A sound picture with a compressed comment of 2 MB, which Pillow refuses to open, and so transformers."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * (2 << 20), zip=True)
    return encoded(64, 64, pnginfo=info)


def rejected(data: bytes) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        decoder().probe(data, "a.png")
    return str(caught.value.reason), caught.value.evidence


@pytest.mark.parametrize(
    ("data", "reason", "says"),
    [
        (encoded(27, 60), "image_too_small", "27 x 60"),
        (encoded(6000, 28), "image_aspect_ratio", "214.3"),
        (bomb(), "image_too_large", "400000000 pixels"),
        (b"", "image_unreadable", "0 bytes"),
        (b"GIF89a no picture", "image_unreadable", ""),
        (encoded(64, 64)[:-3000], "image_unreadable", "truncated"),
        (encoded(64, 64, "JPEG")[:-900], "image_unreadable", "truncated"),
        (wordy_png(), "processor_failed", "MAX_TEXT_CHUNK"),
    ],
)
def test_bad_images_have_their_reason(data: bytes, reason: str, says: str) -> None:
    found, evidence = rejected(data)
    assert found == reason
    assert says in evidence
    assert "'a.png'" in evidence


def test_transformers_refuses_what_we_call_processor_failed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(wordy_png())
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        load_image(str(tmp_path / "a.png"))


def test_an_animation_broken_after_its_header_is_unreadable() -> None:
    data = encoded(64, 64, "GIF", "P")
    assert rejected(data[: len(data) // 2])[0] == "image_unreadable"


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "P"), ("PNG", "LA")]
)
def test_sizes_are_those_transformers_sees(kind: str, mode: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(90, 40, kind, mode, exif=exif)
    (tmp_path / "image").write_bytes(data)
    found = decoder().probe(data, "a")
    assert (found.width, found.height) == load_image(str(tmp_path / "image")).size
    assert (found.width, found.height) == ((40, 90) if orientation in (6, 8) else (90, 40))


def test_thumbnails_are_upright_and_small() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    small = thumbnail(encoded(900, 400, "JPEG", exif=exif), 90)
    assert small is not None
    assert Image.open(io.BytesIO(small)).size == (40, 90)
    assert thumbnail(b"GIF89a no picture", 90) is None


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(encoded(64, 48))
    (folder / "sub" / "b.jpg").write_bytes(encoded(30, 40, "JPEG"))
    (tmp_path / "outside.png").write_bytes(encoded(64, 64))
    (tmp_path / "raw2").mkdir()
    (tmp_path / "raw2" / "c.png").write_bytes(encoded(64, 64))
    return folder


def copier(raw: Path) -> ImageCopier:
    return ImageCopier(Folder(str(raw)), Folder(str(raw.parent / "attempt" / "blobs")), "file:///final/blobs")


def test_refs_find_the_very_bytes(raw: Path) -> None:
    with copier(raw) as copy:
        copied = [
            copy.copy("b.jpg", "sub/x.jsonl"),
            copy.copy("../a.png", "sub/x.jsonl"),
            copy.copy("a.png", "y.jsonl"),
            copy.copy(f"{raw}/a.png", "y.jsonl"),
            copy.copy(f"file://{raw}/a.png", "y.jsonl"),
            copy.copy(wordy := encoded(50, 60), "y.jsonl"),
        ]
    a, b = (raw / "a.png").read_bytes(), (raw / "sub" / "b.jpg").read_bytes()
    (blob,) = (raw.parent / "attempt" / "blobs").iterdir()
    assert blob.read_bytes() == b + a + wordy  # a shared image is copied once
    for image, data in zip(copied, [b, a, a, a, a, wordy]):
        assert image.blob == f"file:///final/blobs/{blob.name}"
        assert blob.read_bytes()[image.offset : image.offset + image.size] == data
        assert image.digest == xxhash.xxh3_128_digest(data)
    assert [(image.width, image.height) for image in copied] == [(30, 40), *[(64, 48)] * 4, (50, 60)]


def test_an_image_that_came_as_base64_is_kept_once(raw: Path) -> None:
    """In a blob; in the row's text no more than its beginning is left."""
    text = base64.b64encode(encoded(50, 60)).decode()
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A thing."}]
    fields = {"messages": turns, "images": [text]}
    with copier(raw) as copy:
        row = SampleMaker("messages", copy)("a.jsonl", RawRow(0, json.dumps(fields), fields))
    assert "reason" not in row
    assert (row["images"][0]["width"], row["images"][0]["height"]) == (50, 60)
    assert row["raw"] == json.dumps(fields | {"images": [f"{text[:24]}<{len(text)} characters>"]})


def test_blobs_are_no_larger_than_their_limit(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [encoded(40 + n, 40) for n in range(5)]
    monkeypatch.setattr(blobs, "BLOB_BYTES", 2 * len(pictures[4]))
    with copier(raw) as copy:
        copied: list[CopiedImage] = [copy.copy(picture, "x") for picture in pictures]
    assert [image.offset for image in copied] == [0, len(pictures[0]), 0, len(pictures[2]), 0]
    for image, picture in zip(copied, pictures):
        stored = (raw.parent / "attempt" / "blobs" / image.blob.rsplit("/", 1)[1]).read_bytes()
        assert stored[image.offset : image.offset + image.size] == picture


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("../outside.png", "image_path_escapes"),
        ("sub/../../outside.png", "image_path_escapes"),
        ("../raw2/c.png", "image_path_escapes"),  # a neighbour whose name starts alike
        ("/etc/passwd", "image_path_escapes"),
        ("http://example.com/a.png", "image_path_escapes"),
        ("file:///etc/passwd", "image_path_escapes"),
        ("link.png", "image_path_escapes"),
        ("linked/c.png", "image_path_escapes"),
        ("gone.png", "image_missing"),
        ("a.png/b.png", "image_missing"),
        ("sub", "image_missing"),
        ("pipe", "image_missing"),
        ("nul\0.png", "image_missing"),
        ("x" * 300, "image_missing"),
        ("loop", "image_missing"),
        ("inner.png", None),
    ],
)
def test_paths(raw: Path, image: str, reason: str | None) -> None:
    (raw / "link.png").symlink_to(raw.parent / "outside.png")
    (raw / "linked").symlink_to(raw.parent / "raw2")
    (raw / "inner.png").symlink_to("a.png")
    (raw / "loop").symlink_to("loop")
    os.mkfifo(raw / "pipe")  # would block for ever
    with copier(raw) as copy:
        if reason is None:
            assert copy.copy(image, "x.jsonl").width == 64
            return
        with pytest.raises(RowError) as caught:
            copy.copy(image, "x.jsonl")
    assert str(caught.value.reason) == reason
    assert caught.value.evidence


def test_a_raw_folder_may_be_a_link_itself(raw: Path) -> None:
    (raw.parent / "alias").symlink_to(raw)
    with copier(raw.parent / "alias") as copy:
        for folder in (".", raw.parent / "alias", raw.resolve()):
            assert copy.copy(f"{folder}/a.png", "x.jsonl").width == 64


def test_uris_into_the_raw_folder(raw: Path) -> None:
    (raw / "a b.png").symlink_to("a.png")
    (raw / "50%20.png").symlink_to("a.png")
    named = (raw / "a b.png").resolve().parent
    uris = [f"file://{named}/a b.png", f"file://localhost{named}/a%20b.png", f"file:{named}/a b.png", "file:a%20b.png"]
    uris.append(f"FILE://{named}/a b.png")
    with copier(raw) as copy:
        for uri in [(named / "a b.png").as_uri(), *uris, f"file://{named}/50%20.png", "file:50%2520.png"]:
            assert copy.copy(uri, "x.jsonl").width == 64
        with pytest.raises(RowError, match="is a URL"):
            copy.copy(f"file://host{named}/a.png", "x.jsonl")


def test_images_beside_the_rows_of_a_linked_folder(raw: Path) -> None:
    (raw / "linked").symlink_to(raw.parent / "raw2")
    with copier(raw) as copy:
        assert copy.copy("c.png", "linked/x.jsonl").width == 64
        with pytest.raises(RowError, match="out of the raw folder"):
            copy.copy("../linked/c.png", "sub/x.jsonl")


def test_a_snapshot_of_the_hub_links_into_its_blobs(raw: Path) -> None:
    repository = raw.parent / "hub" / "datasets--a--b"
    snapshot = repository / "snapshots" / "0123" / "train"
    for folder in (snapshot, repository / "blobs", raw.parent / "hub" / "blobs"):
        folder.mkdir(parents=True)
    for name, folder in (("in.png", repository), ("out.png", raw.parent / "hub")):
        (folder / "blobs" / "abc").write_bytes((raw / "a.png").read_bytes())
        (snapshot / name).symlink_to(os.path.relpath(folder / "blobs" / "abc", snapshot))
    for root, file in ((snapshot, "x.jsonl"), (snapshot.parent, "train/x.jsonl")):
        with copier(root) as copy:
            assert copy.copy("in.png", file).width == 64
            with pytest.raises(RowError, match="out of the raw folder"):
                copy.copy("out.png", file)


def test_huge_files_are_refused_before_they_are_read(raw: Path) -> None:
    with open(raw / "huge.png", "wb") as stream:
        stream.truncate(blobs.MAX_IMAGE_BYTES + 1)
    with copier(raw) as copy, pytest.raises(RowError) as caught:
        copy.copy("huge.png", "x.jsonl")
    assert str(caught.value.reason) == "image_too_large"
