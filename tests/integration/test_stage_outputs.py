"""What stages do with an output that is there, with attempts of dead runs, and with a row that got lost."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from kanyun.errors import DatasetError, UserError
from pipeline.stages.filter import FilterStage
from pipeline.stages.preprocess import PreprocessStage
from tests.support.raw_rows import lines, write_lines


def test_finished_work_is_skipped_and_other_work_is_refused(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_lines(raw / "a.jsonl", lines([{"text": f"document {n}"} for n in range(5)]))
    first = PreprocessStage(str(raw), str(out / "p"), "text").run()
    FilterStage(str(out / "p"), str(out / "f")).run()
    capsys.readouterr()
    assert PreprocessStage(str(raw), str(out / "p"), "text").run() == first
    assert FilterStage(str(out / "p"), str(out / "f")).run().counts.rows_out == 5
    assert capsys.readouterr().out.count("already done, skipped") == 2

    with pytest.raises(UserError, match=r"dataset is text there and messages here.*--overwrite"):
        PreprocessStage(str(raw), str(out / "p"), "messages").run()
    with pytest.raises(UserError, match="stage is filter there and preprocess here"):
        PreprocessStage(str(raw), str(out / "f"), "text").run()
    write_lines(raw / "b.jsonl", lines([{"text": "one more"}]))
    with pytest.raises(UserError, match="input is"):
        PreprocessStage(str(raw), str(out / "p"), "text").run()
    assert PreprocessStage(str(raw), str(out / "p"), "text").run(overwrite=True).counts.rows_out == 6
    with pytest.raises(UserError, match="input is"):
        FilterStage(str(out / "p"), str(out / "f")).run()
    assert FilterStage(str(out / "p"), str(out / "f")).run(overwrite=True).counts.rows_out == 6

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"holds mine\.txt and no output of the preprocess stage"):
        PreprocessStage(str(raw), str(tmp_path / "notes"), "text").run()
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"
    assert not [path for path in out.iterdir() if path.name.startswith("_attempt")]


def test_a_lost_row_is_found(spark: SparkSession, tmp_path: Path) -> None:
    write_lines(tmp_path / "raw" / "a.jsonl", lines([{"text": f"document {n}"} for n in range(5)]))
    PreprocessStage(str(tmp_path / "raw"), str(tmp_path / "p"), "text").run()

    class Lossy(FilterStage):
        def transform(self, rows: Any, attempt: Any) -> Any:
            return super().transform(rows, attempt).where("position > 0")

    with pytest.raises(DatasetError, match=r"5 rows in \+ 0 added is not 4 out \+ 0 quarantined"):
        Lossy(str(tmp_path / "p"), str(tmp_path / "f")).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "raw"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("preprocess {0}/raw {0}/o --dataset lava", "unknown dataset 'lava', known are "),
        ("preprocess {0}/nowhere {0}/o --dataset text", "nowhere does not exist"),
        ("preprocess {0}/empty {0}/o --dataset text", "empty has no rows"),
        ("preprocess {0}/raw {0}/raw/o --dataset text", "is in the raw folder"),
        ("filter {0}/raw {0}/o", "holds no finished stage, and an output of preprocess is needed"),
        ("run {0}/recipe.yaml", "unknown key 'tokeniser', the nearest known one is 'tokenizer'"),
        ("run {0}/nowhere.yaml", "there is no recipe"),
    ],
)
def test_mistakes_end_with_one_sentence_and_code_2(arguments: str, says: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "raw" / "a.jsonl", [b'{"text": "document"}'])
    (tmp_path / "empty").mkdir()
    (tmp_path / "recipe.yaml").write_text("output: o\ntokeniser: t\nlength: 8\ndatasets: {}\n")
    command = [sys.executable, "-m", "pipeline", *arguments.format(tmp_path).split()]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1
