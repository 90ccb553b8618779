"""The dataset format: what is written comes back, and no damage goes unseen."""

import base64
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from kanyun.errors import DatasetError
from kanyun.manifest import Counts, Manifest
from kanyun.naming import discover
from kanyun.preview import preview
from kanyun.reader import PackedDataset
from kanyun.schema import Sample
from kanyun.storage import Folder
from kanyun.verify import verify
from kanyun.writer import ShardResult, ShardWriter, publish

LENGTH = 64
FACTS = dict(
    length=LENGTH, vision_budget=64, part=0, epoch=0, seed=1, ratios={"a": "1"}, packs_lower_bound=1, tokenizer="t",
    processor={"merge_size": 2}, pad_token_id=0, image_token_id=7,
)  # fmt: skip


def sample(i: int, tokens: int, image: bool = False) -> Sample:
    ids = np.arange(i, i + tokens, dtype=np.int32) + 10
    if image:
        ids[:4] = 7
    mask = np.arange(tokens) % 2 == 1
    images = [bytes([i % 256]) * 1000] if image else []
    return Sample(i, "ab"[i % 2], 0, 0, ids, mask, [(1, 4, 4)] if image else [], images)


def write(folder: Folder, shards: int = 2, packs: int = 5) -> Manifest:
    results = []
    for index in range(shards):
        with ShardWriter(folder, index, shards, LENGTH, 0, ["a", "b"]) as writer:
            for n in range(packs):
                i = 100 * index + 2 * n
                writer.add([sample(i, 20, image=n % 2 == 0), sample(i + 1, 44 if n == 1 else 30)])
        assert writer.result is not None
        results.append(ShardResult.from_row(writer.result.row()))
    samples = 2 * shards * packs
    return publish(folder, results, counts=Counts(rows_in=samples, packed=samples), **FACTS)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(str(tmp_path / "packed_length_64_0_epoch_0_v4"))
    write(folder)
    return folder


def test_packs_come_back_as_written(folder: Folder) -> None:
    dataset = PackedDataset(folder)
    packs = [pack for number in range(len(dataset)) for pack in dataset.read_batch(number)]
    assert len(packs) == dataset.manifest.packs == 10
    first, full = packs[0], packs[1]
    assert first.cu_seqlens.tolist() == [0, 20, 50, 64]
    assert full.cu_seqlens.tolist() == [0, 20, 64], "a full pack has no tail"
    assert (first.tokens, full.tokens, first.patches, full.patches) == (50, 64, 16, 0)
    expected = np.concatenate([sample(0, 20, True).input_ids, sample(1, 30).input_ids, np.zeros(14, np.int32)])
    assert (first.input_ids == expected).all()
    assert first.loss_mask.tolist() == [i % 2 == 1 for i in range(20)] + [i % 2 == 1 for i in range(30)] + [False] * 14
    assert first.images == [bytes(1000)]
    assert first.image_grid_thw.tolist() == [[1, 4, 4]]
    assert first.sample_ids.tolist() == [0, 1]
    assert first.dataset == ["a", "b"]
    assert packs[5].pack_id == 1 << 32
    assert dataset.pack_attention[:2].tolist() == [20**2 + 30**2, 20**2 + 44**2]
    assert dataset.pack_segments.tolist() == [len(pack.cu_seqlens) - 1 for pack in packs]
    for counts, each in ((dataset.pack_patches, 16), (dataset.pack_images, 1), (dataset.pack_windows, 1)):
        assert counts.tolist() == [each, 0, each, 0, each] * 2
    assert list(verify(folder)) == []


def test_batches_are_read_by_range_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kanyun.writer.BATCH_BYTES", 2000)  # several record batches a shard
    folder = Folder(str(tmp_path / "d"))
    write(folder, shards=1, packs=9)
    dataset = PackedDataset(folder)
    assert dataset.packs_per_batch.tolist() == [3, 4, 2]  # every 1st, 3rd, 5th ... has an image of 1,000 bytes
    ids = [pack.pack_id for number in reversed(range(len(dataset))) for pack in reversed(dataset.read_batch(number))]
    assert ids == list(reversed(range(9)))
    whole = pa.ipc.open_file(folder.read(dataset.manifest.shards[0].name)).read_all()
    assert whole["pack_id"].to_pylist() == list(range(9)), "any Arrow reader opens a shard"


def test_digest_depends_on_content_alone(tmp_path: Path) -> None:
    one, two = (write(Folder(str(tmp_path / name))) for name in ("one", "two"))
    assert one.content_digest == two.content_digest == replace(one, code_version="other").content_digest
    assert replace(one, seed=2).content_digest != one.content_digest
    assert Manifest.load(Folder(str(tmp_path / "one"))) == one


def test_lineage_names_every_segment(folder: Folder) -> None:
    rows = pq.read_table(Path(folder.path) / "lineage").to_pylist()
    assert len(rows) == 20
    assert rows[1] == dict(pack_id=0, segment=1, sample_id=1, dataset="b", copy=0, piece=0, tokens=30)


def test_a_sample_id_of_two_rows_is_a_fault_that_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path / "d"))
    twice = [sample(6, 10), sample(8, 10)]  # data path a
    shared = replace(sample(8, 10), dataset="b", copy=1)
    with ShardWriter(folder, 0, 1, LENGTH, 0, ["a", "b"]) as writer:
        writer.add([*twice, sample(7, 10)])
        writer.add([sample(9, 10), shared])
        writer.add([sample(6, 10), replace(sample(7, 10), copy=1), replace(sample(7, 10), piece=1)])
    assert writer.result is not None
    publish(folder, [writer.result], counts=Counts(rows_in=8, packed=8), **FACTS | {"vision_budget": 0})
    for samples_at_a_time in (4_000_000, 3):
        monkeypatch.setattr("kanyun.verify.PART_SAMPLES", samples_at_a_time)
        faults = sorted(fault.partition(": ")[2] for fault in verify(folder))
        assert faults == [
            "sample_id 6 is of two rows: "
            "pack 0, segment 0 (a, copy 0, piece 0) and pack 2, segment 0 (a, copy 0, piece 0)",
            "sample_id 8 is of two rows: "
            "pack 0, segment 1 (a, copy 0, piece 0) and pack 1, segment 1 (b, copy 1, piece 0)",
        ]


def test_losing_attempts_are_removed(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "d"))
    with pytest.raises(RuntimeError), ShardWriter(folder, 0, 1, LENGTH, 0, ["a"]) as writer:
        writer.add([sample(0, 3)])
        raise RuntimeError("killed")
    write(folder)
    assert not [name for name in folder.names() if name.startswith("_attempt")]


def test_a_lost_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="3 rows in"):
        publish(Folder(str(tmp_path / "d")), [], counts=Counts(rows_in=3, packed=2), **FACTS)
    assert not (tmp_path / "d" / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["shard", "batches.arrow", "manifest.json", "lineage"])
@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, kind: str, place: float, bit: int
) -> None:
    root = tmp_path_factory.getbasetemp() / "flips"
    folder = Folder(str(root))
    if not root.exists():
        write(folder)
    path = next(root / name for name, _ in folder.files() if kind in name)
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[int(place * len(sound))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        faults = list(verify(folder))
    except DatasetError as error:
        faults = [str(error)]
    finally:
        path.write_bytes(sound)
    assert path.name in " ".join(faults)


def test_reading_stops_at_damage_and_names_it(folder: Folder) -> None:
    dataset = PackedDataset(folder)
    path = Path(folder.path) / dataset.manifest.shards[1].name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    dataset.read_batch(0)
    with pytest.raises(DatasetError, match=r"shard-00001-of-00002.arrow, record batch 1 at byte \d+"):
        dataset.read_batch(1)


def test_unfinished_and_missing_datasets_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no packed dataset"):
        discover(str(tmp_path))
    (tmp_path / "packed_length_64_0_epoch_0_v4").mkdir()
    with pytest.raises(DatasetError, match=r"no manifest.json"):
        discover(str(tmp_path))
    write(Folder(str(tmp_path / "packed_length_64_0_epoch_0_v4")))
    assert [f.name for f in discover(str(tmp_path))] == ["packed_length_64_0_epoch_0_v4"]


def test_preview_shows_text_trained_tokens_and_images(folder: Folder) -> None:
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(400)}, unk_token="w0"))
    (folder / "tokenizer").write("tokenizer.json", tokenizer.to_str().encode())
    page = preview(folder, 1)
    assert page.count("<img") == 1
    assert base64.b64encode(bytes(1000)).decode() in page
    assert "alt='image of 4 tokens'>w14<mark>w15</mark>w16<mark>" in page, "odd tokens are trained, the image in place"
    assert "padding" in page
    assert page.count("<h2>") == 1
    assert "<q>w7 · w7 · w15 · w17 · " in page, "what is trained is seen without opening a segment"
