"""The five stages as people run them, on one raw folder: the same bytes for any parallelism and any order of files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from kanyun.storage import Folder
from pipeline.flow import Done, links
from pipeline.recipe import Recipe
from pipeline.reports.report import Report
from tests.support.fault_runs import PACKED
from tests.support.raw_conversations import FILES, ROWS_A_FILE, raw_files, write_raw

# Spark reads these from the environment of a driver that it starts itself: other splits, other shuffles.
OTHER_SETTINGS = "--conf spark.sql.files.maxPartitionBytes=30000 --conf spark.sql.shuffle.partitions=3 pyspark-shell"


def run_all(raw: Path, out: Path, model: Path, master: str, spark_settings: str) -> dict[str, object]:
    """The manifest that the five commands leave."""
    recipe = out / "recipe.yaml"
    out.mkdir()
    settings = {"output": str(out / "run"), "tokenizer": str(model), "length": 256, "seed": 3}
    datasets = {"chat": {"raw": str(raw), "dataset": "messages", "ratio": 0.7}}
    recipe.write_text(json.dumps(settings | {"datasets": datasets}))  # JSON is YAML
    environment = os.environ | {"SPARK_MASTER": master, "PYSPARK_SUBMIT_ARGS": spark_settings}
    command = [sys.executable, "-m", "pipeline", "run", str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = out / "run" / PACKED / "manifest.json"
    result: dict[str, object] = json.loads(manifest.read_text())
    return result


def check_index(run: Path) -> None:
    """index.html leads to every report, and by the numbers of these every node of the flow has as much in as out."""
    folders = re.findall('href="(.*?)/report.html"', (run / "index.html").read_text())
    stages = ["preprocess", "filter", "sample", "build", "pack"]
    done = [
        Done(folder, Report.load(Folder(str(run / folder)), stage), "chat" if "/chat" in folder else "")
        for folder, stage in zip(folders, stages, strict=True)
    ]
    for node in (one.node for one in done):
        came = sum(link.rows for link in links(done) if link.target == node)
        went = sum(link.rows for link in links(done) if link.source == node)
        assert came == went > 0


def test_same_content_digest_however_it_is_run(on_hdfs: tuple[Recipe, Folder], tmp_path: Path) -> None:
    """On HDFS by two tasks at a time; on a local disk by four, with other splits, from files made in another order."""
    recipe, out = on_hdfs
    write_raw(tmp_path / "raw", sorted(raw_files())[::-1])
    local = run_all(tmp_path / "raw", tmp_path / "local", Path(recipe.tokenizer), "local[4]", OTHER_SETTINGS)
    hdfs = json.loads((out / PACKED).read("manifest.json"))
    assert local["content_digest"] == hdfs["content_digest"]
    assert local["shards"] == hdfs["shards"]
    check_index(tmp_path / "local" / "run")
    rows = ROWS_A_FILE * FILES
    kept = int((rows - FILES) * 0.7)
    assert local["counts"] == {
        "rows_in": rows, "added": 0, "quarantined": FILES, "dropped": rows - FILES - kept, "packed": kept
    }  # fmt: skip
