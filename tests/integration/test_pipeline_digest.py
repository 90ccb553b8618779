"""The five stages as people run them, on one raw folder: the same bytes for any parallelism and any order of files."""

import json
import re
from pathlib import Path

import pytest

from kanyun.storage import Folder
from pipeline.flow import Done, links
from pipeline.recipe import Recipe
from pipeline.reports.report import Report
from pipeline.stages import base
from pipeline.stages.table import STAGES
from tests.support.fault_runs import PACKED, recipe_for
from tests.support.raw_conversations import FILES, ROWS_A_FILE, raw_files, write_raw
from tests.support.spark_sessions import spark_on

OTHER_SPLITS = {"spark__sql__files__maxPartitionBytes": "30000"}


def check_index(run: Path) -> None:
    """index.html leads to every report, and by the numbers of these every node of the flow has as much in as out."""
    folders = re.findall('href="(.*?)/report.html"', (run / "index.html").read_text())
    done = [
        Done(folder, Report.load(Folder(str(run / folder)), stage.name), "chat" if stage.per_path else "")
        for folder, stage in zip(folders, STAGES, strict=True)
    ]
    for node in (one.node for one in done):
        came = sum(link.rows for link in links(done) if link.target == node)
        went = sum(link.rows for link in links(done) if link.source == node)
        assert came == went > 0


def test_same_content_digest_however_it_is_run(
    on_hdfs: tuple[Recipe, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On HDFS by two tasks at a time; on a local disk by four, with other splits, from files made in another order."""
    recipe, out = on_hdfs
    write_raw(tmp_path / "raw", sorted(raw_files())[::-1])
    monkeypatch.setattr(base, "SHUFFLE_PARTITIONS", 3)
    with spark_on("local[4]", **OTHER_SPLITS):
        recipe_for(Folder(str(tmp_path)), Path(recipe.tokenizer)).run(overwrite=False)
    local = json.loads((tmp_path / "out" / PACKED / "manifest.json").read_text())
    hdfs = json.loads((out / PACKED).read("manifest.json"))
    assert local["content_digest"] == hdfs["content_digest"]
    assert local["shards"] == hdfs["shards"]
    check_index(tmp_path / "out")
    rows = ROWS_A_FILE * FILES
    kept = int((rows - FILES) * 0.7)
    assert local["counts"] == {
        "rows_in": rows, "added": 0, "quarantined": FILES, "dropped": rows - FILES - kept, "packed": kept
    }  # fmt: skip
