"""sample, build and pack of text alone: long documents, and nothing at all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from transformers import AutoProcessor

from kanyun.errors import UserError
from kanyun.reader import PackedDataset
from kanyun.storage import Folder
from pipeline.reports.report import RowCounts
from pipeline.schema import SAMPLE
from pipeline.stages.build import BuildStage
from pipeline.stages.pack import PackStage
from pipeline.stages.sample import SampleStage
from tests.support.filtered_rows import part, read, save_filtered
from tests.support.qwen_assets import tiny_text_folder


def test_long_documents_split_or_go_to_quarantine(spark: SparkSession, tmp_path: Path) -> None:
    rows = []
    for number, (text, messages) in enumerate(
        [
            ("import " * 200, None),
            ("short text", None),
            (
                None,
                [{"role": "user", "content": [part("import " * 200)]}, {"role": "assistant", "content": [part("yes")]}],
            ),
        ]
    ):
        row: dict[str, Any] = dict.fromkeys(SAMPLE.names)
        row |= {
            "sample_id": number,
            "dataset": "d",
            "file": "f",
            "position": number,
            "images": [],
            "raw": f"raw {number}",
        }
        rows.append(row | {"text": text, "messages": messages, "content_hash": bytes(16)})
    (tmp_path / "filtered").mkdir()
    save_filtered(tmp_path / "filtered", rows)
    tiny_text_folder(tmp_path / "hf")
    SampleStage(str(tmp_path / "filtered"), str(tmp_path / "sampled")).run()
    build = BuildStage(str(tmp_path / "sampled"), str(tmp_path / "built"), tokenizer=str(tmp_path / "hf"), length=64)
    build.run()
    assert [row["sample_id"] for row in read(tmp_path / "built")] == [1]
    bad = {row["sample_id"]: row for row in read(tmp_path / "built", "quarantine")}
    assert {i: row["reason"] for i, row in bad.items()} == {0: "too_long", 2: "too_long"}
    assert bad[0]["raw"] == "raw 0"
    assert [(m["role"], m["content"]) for m in bad[2]["messages"]] == [
        (m["role"], m["content"]) for m in rows[2]["messages"]
    ]
    assert "tokens, the length is 64" in bad[0]["evidence"]
    whole = AutoProcessor.from_pretrained(tmp_path / "hf")("import " * 200)["input_ids"]

    report = replace(build, overflow="split").run(overwrite=True)
    pieces = sorted((row for row in read(tmp_path / "built") if row["sample_id"] == 0), key=lambda row: row["piece"])
    assert [row["piece"] for row in pieces] == list(range(-(-(len(whole) + 1) // 64)))
    assert [token for row in pieces for token in row["input_ids"]][:-1] == whole
    assert report.counts == RowCounts(3, len(pieces) + 1, len(pieces) - 1, {"too_long": 1}, 0)

    PackStage.below(str(tmp_path / "built"), str(tmp_path / "packed"), 64).run()
    manifest = PackedDataset(Folder(str(tmp_path / "packed/packed_length_64_0_epoch_0_v4"))).manifest
    assert (manifest.vision_budget, manifest.image_token_id, manifest.patches) == (0, None, 0)
    assert manifest.tokens == len(whole) + 1 + sum(
        row["tokens"] for row in read(tmp_path / "built") if row["sample_id"] == 1
    )


def test_nothing_to_pack_is_said_clearly(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "filtered").mkdir()
    save_filtered(tmp_path / "filtered", [])
    tiny_text_folder(tmp_path / "hf")
    SampleStage(str(tmp_path / "filtered"), str(tmp_path / "sampled")).run()
    BuildStage(str(tmp_path / "sampled"), str(tmp_path / "built"), tokenizer=str(tmp_path / "hf"), length=64).run()
    with pytest.raises(UserError, match="has no samples"):
        PackStage.below(str(tmp_path / "built"), str(tmp_path / "packed"), 64).run()
