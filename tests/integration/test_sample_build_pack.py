"""sample, build and pack on real Spark, from a filter output made here."""

import io
import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image
from pyspark.sql import SparkSession
from transformers import AutoProcessor

from kanyun.__main__ import main as kanyun_command
from kanyun.errors import DatasetError, UserError
from kanyun.fingerprint import fingerprint
from kanyun.reader import PackedDataset
from kanyun.schema import Pack as StoredPack
from kanyun.storage import Folder
from kanyun.verify import verify
from pipeline.reports.report import Report
from pipeline.spark import spark_session
from pipeline.stages.build import BuildStage
from pipeline.stages.pack import PackStage
from pipeline.stages.sample import SampleStage
from tests.support.filtered_rows import Raw, read, save_filtered
from tests.support.qwen3_vl_assets import TOKEN_PIXELS, qwen3_vl_tokenizer_folder
from tests.support.qwen_assets import tiny_tokenizer_folder, tiny_vl_folder
from trainer.data.source import PackedData

LENGTH = 256


@dataclass(frozen=True)
class SmallBuckets(PackStage):
    bucket_samples: ClassVar[int] = 40


def packs_of(folder: str) -> list[StoredPack]:
    dataset = PackedDataset(Folder(folder))
    return [pack for n in range(len(dataset)) for pack in dataset.read_batch(n)]


@pytest.fixture(scope="module")
def made(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Raw]:
    """The three stages once: 300 rows, more than one bucket."""
    root = tmp_path_factory.mktemp("made")
    raw = Raw(root / "filtered", 300)
    tiny_vl_folder(root / "hf", max_pixels=32 * 28 * 28)
    SampleStage(str(root / "filtered"), str(root / "sampled"), seed=5).run()
    BuildStage(str(root / "sampled"), str(root / "built"), tokenizer=str(root / "hf"), length=LENGTH).run()
    SmallBuckets.below(str(root / "built"), str(root / "packed"), LENGTH).run()
    return root, raw


def packed(root: Path) -> str:
    return str(root / "packed" / f"packed_length_{LENGTH}_0_epoch_0_v4")


def check_packs(raw: Raw, model: Path, dataset: str, built: Path) -> None:
    """Every sample is packed once, as transformers' processor of this model makes it, or quarantined as too long."""
    processor = AutoProcessor.from_pretrained(model)
    seen: dict[int, int] = {}
    for pack in packs_of(dataset):
        images, grids = iter(pack.images), iter(pack.image_grid_thw.tolist())
        for n, sample_id in enumerate(pack.sample_ids.tolist()):
            row = raw.rows[sample_id]
            seen[sample_id] = seen.get(sample_id, 0) + 1
            ids = pack.input_ids[pack.cu_seqlens[n] : pack.cu_seqlens[n + 1]]
            mask = pack.loss_mask[pack.cu_seqlens[n] : pack.cu_seqlens[n + 1]]
            encoded = [next(images) for _ in row["images"]]
            assert encoded == raw.images.get(sample_id, [])
            if row["text"] is not None:
                assert ids.tolist() == [
                    *processor.tokenizer(row["text"])["input_ids"],
                    processor.tokenizer.pad_token_id,
                ]
                assert mask.all()
                continue
            text = processor.apply_chat_template(row["messages"])
            pictures = [Image.open(io.BytesIO(data)) for data in encoded]
            expected = processor(text=[text], images=pictures or None)
            assert ids.tolist() == expected["input_ids"][0]
            assert [next(grids) for _ in encoded] == [list(grid) for grid in expected.get("image_grid_thw", [])]
            trained = processor.tokenizer.decode(ids[mask])
            assert trained == row["messages"][1]["content"][0]["text"] + "<|im_end|>"
        assert next(images, None) is None
    quarantined = {row["sample_id"]: row["reason"] for row in read(built, "quarantine")}
    assert seen == dict.fromkeys(set(raw.rows) - set(quarantined), 1)
    assert set(quarantined.values()) <= {"too_long"}


def test_every_sample_is_packed_once_as_the_processor_makes_it(made: tuple[Path, Raw]) -> None:
    root, raw = made
    check_packs(raw, root / "hf", packed(root), root / "built")


def test_the_same_samples_for_qwen3_vl(
    made: tuple[Path, Raw],
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, raw = made
    model = qwen3_vl_tokenizer_folder(
        tmp_path / "hf", real_vocabulary=False, min_pixels=4 * TOKEN_PIXELS, max_pixels=32 * TOKEN_PIXELS
    )
    BuildStage(str(root / "sampled"), str(tmp_path / "built"), tokenizer=str(model), length=LENGTH).run()
    SmallBuckets.below(str(tmp_path / "built"), str(tmp_path / "packed"), LENGTH).run()
    check_packs(raw, model, packed(tmp_path), tmp_path / "built")
    assert list(verify(Folder(packed(tmp_path)))) == []
    one, other = (PackedDataset(Folder(packed(at))).manifest for at in (root, tmp_path))
    assert one.processor is not None
    assert other.processor is not None
    assert (one.processor["patch_size"], other.processor["patch_size"]) == (14, 16)
    assert one.content_digest != other.content_digest
    for at, its, own in ((root, 14, model), (tmp_path, 16, root / "hf")):  # the trainer refuses the other's packs
        with pytest.raises(
            DatasetError,
            match=f"built for a model with patch_size {its}, but the model folder has patch_size {30 - its}: build",
        ):
            PackedData(str(at / "packed"), LENGTH, fingerprint(Folder(str(own))))
    PackedData(str(tmp_path / "packed"), LENGTH, fingerprint(Folder(str(model))))
    monkeypatch.setattr("sys.argv", ["kanyun", "info", str(tmp_path / "packed")])
    assert kanyun_command() == 0
    assert "patches of 16 x 16 pixels, 2 x 2 of them a token; images of 4,096 to 32,768" in capsys.readouterr().out


def test_images_are_not_built_for_an_image_model_without_image_settings(made: tuple[Path, Raw], tmp_path: Path) -> None:
    model = tiny_tokenizer_folder(tmp_path / "hf", vision=False)
    (model / "config.json").write_text(json.dumps({"vision_config": {"patch_size": 14}}))
    with pytest.raises(UserError, match=r"hf has no preprocessor_config\.json, which samples with images need"):
        BuildStage(str(made[0] / "sampled"), str(tmp_path / "built"), tokenizer=str(model), length=LENGTH).run()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_packed_dataset_is_sound_and_tells_its_facts(made: tuple[Path, Raw]) -> None:
    root, _ = made
    assert list(verify(Folder(packed(root)))) == []
    manifest = PackedDataset(Folder(packed(root))).manifest
    quarantined = len(read(root / "built", "quarantine"))
    assert len(manifest.shards) == -(-(300 - quarantined) // 40)
    assert manifest.counts.rows_in == 300
    assert (manifest.counts.packed, manifest.counts.quarantined) == (300 - quarantined, quarantined)
    assert (manifest.seed, manifest.epoch, manifest.ratios) == (5, 0, {".": "1"})
    assert manifest.vision_budget % 64 == 0
    assert manifest.packs_lower_bound <= manifest.packs
    assert manifest.processor is not None
    assert manifest.processor["max_pixels"] == 32 * 28 * 28
    report = json.loads(Path(packed(root), "report.json").read_text())
    assert report["facts"]["packs"] == manifest.packs
    assert report["counts"]["rows_out"] == 300 - quarantined
    assert Path(packed(root), "tokenizer", "tokenizer.json").read_bytes() == (root / "hf/tokenizer.json").read_bytes()


def test_finished_work_is_skipped_and_other_work_is_refused(made: tuple[Path, Raw], capsys: Any) -> None:
    root, _ = made
    before = Path(packed(root), "manifest.json").stat().st_mtime_ns
    SmallBuckets.below(str(root / "built"), str(root / "packed"), LENGTH).run()
    assert "already done, skipped" in capsys.readouterr().out
    assert Path(packed(root), "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"vision_budget.*--overwrite"):
        SmallBuckets.below(str(root / "built"), str(root / "packed"), LENGTH, vision_budget=10**6).run()
    with pytest.raises(UserError, match=r"--length is 512, but .* --length 256"):
        PackStage.below(str(root / "built"), str(root / "packed"), 512)
    with pytest.raises(UserError, match=r"--epoch is 1, but .* --epoch 0"):
        PackStage.below(str(root / "built"), str(root / "packed"), LENGTH, epoch=1)
    with pytest.raises(UserError, match=r"--vision-budget is 70 .* least that fills packs is \d+"):
        PackStage.below(str(root / "built"), str(root / "tight"), LENGTH, vision_budget=70).run()
    assert list((root / "tight").iterdir()) == []  # nothing is left behind


def test_same_bytes_for_other_files_and_partitions(made: tuple[Path, Raw], spark: SparkSession, tmp_path: Path) -> None:
    root, raw = made
    rows = list(raw.rows.values())
    random.Random(9).shuffle(rows)
    (tmp_path / "filtered").mkdir()
    save_filtered(tmp_path / "filtered", rows, files=7)
    settings = {"spark.sql.shuffle.partitions": "5", "spark.sql.files.maxPartitionBytes": "20000"}
    usual = {key: spark_session().conf.get(key) for key in settings}
    try:
        for key, value in settings.items():
            spark_session().conf.set(key, value)
        SampleStage(str(tmp_path / "filtered"), str(tmp_path / "sampled"), seed=5).run()
        BuildStage(str(tmp_path / "sampled"), str(tmp_path / "built"), tokenizer=str(root / "hf"), length=LENGTH).run()
        SmallBuckets.below(str(tmp_path / "built"), str(tmp_path / "packed"), LENGTH).run()
    finally:
        for key, before in usual.items():
            spark_session().conf.set(key, before)
    one, other = (PackedDataset(Folder(packed(p))).manifest for p in (root, tmp_path))
    assert one.content_digest == other.content_digest
    assert [s.digest for s in one.shards] == [s.digest for s in other.shards]


def test_rows_that_share_a_sample_id_are_refused_by_both_names(
    made: tuple[Path, Raw], spark: SparkSession, tmp_path: Path
) -> None:
    root, raw = made
    one, other = [row for row in raw.rows.values() if row["text"] is not None][:2]
    (tmp_path / "filtered").mkdir()
    save_filtered(tmp_path / "filtered", [one, other | {"sample_id": one["sample_id"], "file": "b.jsonl"}])
    SampleStage(str(tmp_path / "filtered"), str(tmp_path / "sampled")).run()
    BuildStage(str(tmp_path / "sampled"), str(tmp_path / "built"), tokenizer=str(root / "hf"), length=LENGTH).run()
    first, second = (f"made: {name} @ {row['position']}" for name, row in (("a.jsonl", one), ("b.jsonl", other)))
    with pytest.raises(DatasetError, match=f"two rows have the sample_id {one['sample_id']}: {first} and {second}; "):
        PackStage.below(str(tmp_path / "built"), str(tmp_path / "packed"), LENGTH).run()
    assert list((tmp_path / "packed").iterdir()) == []


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(made: tuple[Path, Raw], tmp_path: Path) -> None:
    root, _ = made
    model = shutil.copytree(root / "hf", tmp_path / "hf")
    (model / "config.json").write_text('{"vocab_size": 99}')
    stage = BuildStage(str(root / "sampled"), str(tmp_path / "built"), tokenizer=str(model), length=LENGTH)
    with pytest.raises(UserError, match=r"has id .*, but config.json has vocab_size 99, so the model has no embedding"):
        stage.settings()  # what it reads before any row


def test_outputs_of_an_earlier_release_are_no_finished_work_and_no_input(
    made: tuple[Path, Raw], spark: SparkSession, tmp_path: Path
) -> None:
    """Their sample_ids are others: packs of both would mix them."""
    root, _ = made
    for name in ("sampled", "built"):
        shutil.copytree(root / name, tmp_path / name)
        folder = Folder(str(tmp_path / name))
        report = Report.load_if_there(folder)
        assert report is not None
        settings = {key: value for key, value in report.settings.items() if key != "version"}
        replace(report, settings=settings).save(folder)
    with pytest.raises(UserError, match=r"version is None there and 2 here; .*--overwrite"):
        SampleStage(str(root / "filtered"), str(tmp_path / "sampled"), seed=5).run()
    with pytest.raises(
        UserError, match=r"rows of sample in version 1, and version 2 is needed.*sample` again with --over"
    ):
        BuildStage(str(tmp_path / "sampled"), str(tmp_path / "new"), tokenizer=str(root / "hf"), length=LENGTH).run()
    with pytest.raises(UserError, match=r"rows of build in version 1, and version 2 is needed"):
        PackStage.below(str(tmp_path / "built"), str(tmp_path / "packed"), LENGTH)


def test_a_blob_that_changed_is_found(made: tuple[Path, Raw], spark: SparkSession, tmp_path: Path) -> None:
    _, raw = made
    data = tmp_path / "blob"
    data.write_bytes(b"short")
    row = next(row for row in raw.rows.values() if row["images"])
    ref = row["images"][0] | {"blob": data.as_uri(), "offset": 0, "size": 100}
    (tmp_path / "filtered").mkdir()
    save_filtered(tmp_path / "filtered", [row | {"images": [ref]}], files=1)
    tiny_vl_folder(tmp_path / "hf", max_pixels=32 * 28 * 28)
    SampleStage(str(tmp_path / "filtered"), str(tmp_path / "sampled")).run()
    BuildStage(str(tmp_path / "sampled"), str(tmp_path / "built"), tokenizer=str(tmp_path / "hf"), length=LENGTH).run()
    with pytest.raises(Exception, match="ends at byte 5, but images are recorded up to 100"):
        PackStage.below(str(tmp_path / "built"), str(tmp_path / "packed"), LENGTH).run()
    assert list((tmp_path / "packed").iterdir()) == []
