"""Folders as people name them: globs, other scripts without a locale, links, mount points, several spellings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyspark.sql import SparkSession

from kanyun.errors import UserError
from kanyun.reader import PackedDataset
from kanyun.storage import Folder
from pipeline.recipe import Recipe, RecipeDataset
from pipeline.reports.report import Report
from pipeline.stages.filter import FilterStage
from pipeline.stages.preprocess import PreprocessStage
from pipeline.stages.sample import SampleStage
from tests.support.qwen_assets import tiny_tokenizer_folder, tiny_vl_folder
from tests.support.spark_sessions import JAVA_OPTIONS


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two rows, with an image each."""
    folder = tmp_path / "x/raw"
    folder.mkdir(parents=True)
    for n in range(2):
        Image.new("RGB", (60, 60), (90 * n, 9, 9)).save(folder / f"图 {n}#%.png")
    rows = (
        {"messages": [{"role": "user", "content": f"<image>What, {n}?"}, {"role": "assistant", "content": "This one."}],
         "images": [f"图 {n}#%.png"]}
        for n in range(2)
    )  # fmt: skip
    (folder / "行.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("spelling", ["../x/raw", "../x/raw/.", "..//x/raw", "../x/raw/deep/.."])
def test_images_are_in_the_raw_folder_however_it_is_spelt(
    spelling: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spark: SparkSession
) -> None:
    (raw / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    report = PreprocessStage(spelling, "out", "messages").run()
    assert report.reasons == {}
    assert all(len(row["images"]) == 1 for row in pq.read_table(tmp_path / "x/out/data").to_pylist())


def test_the_whole_pipeline_into_folders_with_odd_names_without_a_locale(raw: Path, tmp_path: Path) -> None:
    """As in a container without LANG, and as users run it: with queries that Spark compiles."""
    name = "run:1 [1] {a,b}/数据 a*b?c\\d é #%41&"
    tiny_vl_folder(tmp_path / "hf")
    recipe = tmp_path / "recipe.yaml"
    datasets = {"图": {"raw": str(raw), "dataset": "messages"}}
    values = {"output": str(tmp_path / name), "tokenizer": str(tmp_path / "hf"), "length": 256, "datasets": datasets}
    recipe.write_text(json.dumps(values), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key not in ("LANG", "PYTHONUTF8")}
    command = [sys.executable, "-m", "pipeline", "run", str(recipe)]
    done = subprocess.run(
        command, env=environment | {"LC_ALL": "C", "SPARK_SUBMIT_OPTS": JAVA_OPTIONS}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert b"incubator" not in done.stderr
    packed = PackedDataset(Folder(str(tmp_path / name / "packed/packed_length_256_0_epoch_0_v4")))
    assert packed.manifest.counts.packed == 2
    assert packed.manifest.code_version.startswith("0.1.0+"), "run from a clone"
    images = {image for pack in packed.read_batch(0) for image in pack.images}
    assert images == {path.read_bytes() for path in raw.glob("*.png")}
    assert packed.read_batch(0)[0].dataset[0] == "图"


def test_an_output_that_is_a_link_is_followed(raw: Path, tmp_path: Path, spark: SparkSession) -> None:
    (tmp_path / "disk/space").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/space")
    PreprocessStage(str(raw), str(tmp_path / "out"), "messages").run()
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk/space/report.json").exists()
    FilterStage(str(tmp_path / "out"), str(tmp_path / "clean")).run()
    assert PreprocessStage(str(raw), str(tmp_path / "out"), "messages").run().counts.rows_out == 2
    with pytest.raises(UserError, match=r"the output .*space holds the input"):
        FilterStage(str(tmp_path / "disk/space"), str(tmp_path / "out")).run()


def test_an_image_model_without_image_settings_is_told_once_there_are_images(
    raw: Path, tmp_path: Path, spark: SparkSession
) -> None:
    """Its texts can be packed; images are known after the first stage, which no setting of the model changes."""
    model = tiny_tokenizer_folder(tmp_path / "hf", vision=False)
    (model / "config.json").write_text(json.dumps({"vision_config": {"patch_size": 14}}))
    datasets = {"a": RecipeDataset(str(raw), "messages")}
    with pytest.raises(UserError, match=r"hf has no preprocessor_config\.json, which samples with images need"):
        Recipe(str(tmp_path / "out"), str(model), 256, datasets).run(overwrite=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["preprocess"]


def test_outputs_that_cannot_be_replaced_are_refused_before_any_work(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the output /proc is a mount point.*: choose a folder in it"):
        PreprocessStage(str(raw), "/proc", "messages").run()
    with pytest.raises(UserError, match=r"cannot write below file:///proc/.*: choose an output you may write to"):
        PreprocessStage(str(raw), "/proc/out", "messages").run()
    with pytest.raises(UserError, match=r"caf\\udce9 is a name that is no UTF-8, and Spark cannot use it"):
        PreprocessStage(str(raw), os.fsdecode(bytes(tmp_path) + b"/caf\xe9"), "messages").run()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"the output .*file is a file: choose a folder"):
        PreprocessStage(str(raw), str(tmp_path / "file"), "messages").run()
    assert (tmp_path / "file").read_text() == "mine"


def filtered(raw: Path, out: Path) -> Report:
    PreprocessStage(str(raw), f"{out.parent}/checked-{out.name}", "messages").run()
    return FilterStage(f"{out.parent}/checked-{out.name}", str(out)).run()


def test_every_filter_output_below_in_is_sampled_and_named(
    raw: Path, tmp_path: Path, spark: SparkSession, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "disk").mkdir()
    for path in ("web", "web/en", "_extra", ".more"):
        filtered(raw, tmp_path / "all" / path)
    for link, to in (("latest", "web"), ("web/up", ".."), ("web/itself", "itself"), ("nowhere", "gone")):
        (tmp_path / "all" / link).symlink_to(to)  # no data paths: rows would be sampled twice
    (tmp_path / "all/.more").rename(tmp_path / "disk/.more")
    for link, to in (("inner", "../disk/.more"), ("outer", "../disk"), ("outer-2", "../disk")):
        (tmp_path / "all" / link).symlink_to(to)  # the folder around the other's is followed
    table = tmp_path / "ratios.yaml"
    table.write_text("web: 1\nweb/en: 2\n_extra: 1\nouter/.more: 0\nno: 0.5\n")
    report = SampleStage(str(tmp_path / "all"), str(tmp_path / "out"), ratios=str(table)).run()
    assert report.counts.rows_in == 8
    assert report.facts == {
        "data path _extra": "2 rows x 1 = 2 copies",
        "data path outer/.more": "2 rows x 0 = 0 copies",
        "data path web": "2 rows x 1 = 2 copies",
        "data path web/en": "2 rows x 2 = 4 copies",
        "data path no": f"has a ratio, and no finished output of filter is at {tmp_path}/all/no",
    }
    assert "sample: data path no has a ratio, and no finished output" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out/data").to_pylist()
    assert sorted(row["dataset"] for row in rows) == ["_extra"] * 2 + ["web"] * 2 + ["web/en"] * 4
    assert len({row["sample_id"] for row in rows}) == 6


def test_a_single_filter_output_goes_by_its_folders_name_too(raw: Path, tmp_path: Path, spark: SparkSession) -> None:
    filtered(raw, tmp_path / "charts")
    table = tmp_path / "ratios.yaml"
    table.write_text("charts: 0.5\n")
    assert SampleStage(str(tmp_path / "charts"), str(tmp_path / "out"), ratios=str(table)).run().counts.rows_out == 1
    table.write_text("other: 0.5\n")
    with pytest.raises(UserError, match=r"itself is one output of filter: name it `\.`, or by its folder"):
        SampleStage(str(tmp_path / "charts"), str(tmp_path / "o2"), ratios=str(table)).run()
