"""Build's tasks are cut by work, whatever files sample left, and the tokens do not depend on the cut."""

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from kanyun.storage import Folder
from pipeline.reports.report import Report, RowCounts
from pipeline.schema import SAMPLED, VERSIONS
from pipeline.spark import ROW_GROUP_ROWS, spark_session
from pipeline.stages.build import TASKS_A_CORE, BuildStage
from tests.support.qwen_assets import tiny_tokenizer_folder

ROWS, CORES = 24_000, 2


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of sample in one file, with the row groups that the stages write."""
    folder = tmp_path_factory.mktemp("sampled")
    empty = dict.fromkeys(SAMPLED.names)
    rows = [
        empty | {"sample_id": n, "dataset": "made", "text": f"row {n} " * 8, "images": [], "copy": 0}
        for n in range(ROWS)
    ]
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, SAMPLED), folder / "data" / "one.parquet", row_group_size=ROW_GROUP_ROWS)
    counts = RowCounts(ROWS, ROWS)
    settings = {"version": VERSIONS["sample"], "epoch": 0, "seed": 0, "ratios": {".": "1"}}
    Report("sample", settings, "", "made", counts, counts, 0.0).save(Folder(str(folder)))
    return folder


def test_row_groups_are_as_short_as_stages_write_them(spark: SparkSession, tmp_path: Path) -> None:
    spark_session().range(2 * ROW_GROUP_ROWS + 1).coalesce(1).write.parquet(str(tmp_path / "rows"))
    (file,) = (tmp_path / "rows").glob("*.parquet")
    metadata = pq.ParquetFile(file).metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [2_000, 2_000, 1]


def test_one_file_gives_work_to_every_core_and_the_same_tokens(
    spark: SparkSession, sampled: Path, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer_folder(tmp_path / "tokenizer", vision=False)
    tables = {}
    for name, least in (("whole", "4m"), ("cut", "16k")):  # a file of 4 MB may be cut, or one of 16 kB
        spark_session().conf.set("spark.sql.files.openCostInBytes", least)
        BuildStage(str(sampled), str(tmp_path / name), str(tokenizer), 512).run()
        spark_session().conf.unset("spark.sql.files.openCostInBytes")
        files = sorted((tmp_path / name / "data").glob("*.parquet"))
        rows = [rows for file in files if (rows := pq.ParquetFile(file).metadata.num_rows)]
        if name == "whole":
            assert rows == [ROWS]
        else:
            # One less: the split with the file's footer may have no row group.
            assert len(rows) >= TASKS_A_CORE * CORES - 1
            assert max(rows) <= 2 * ROW_GROUP_ROWS
        tables[name] = pyarrow.dataset.dataset(files).to_table().sort_by("sample_id")
    assert tables["whole"].equals(tables["cut"])
