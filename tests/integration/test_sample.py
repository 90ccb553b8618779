"""The stage sample on real Spark: which copies an epoch has."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from pyspark.sql import SparkSession

from kanyun.errors import UserError
from pipeline.stages.sample import SampleStage, copies_before
from tests.support.filtered_rows import Raw, read

EPOCHS = 6


def test_six_epochs_of_two_data_paths_with_ratios(spark: SparkSession, tmp_path: Path) -> None:
    paths = {"web/a": (Fraction("0.37"), 101), "b": (Fraction("2.5"), 40)}
    for path, (_, count) in paths.items():
        Raw(tmp_path / "all" / path, count, seed=count)
    (tmp_path / "all" / "_attempt-b-dead" / "data").mkdir(parents=True)
    table = tmp_path / "ratios.yaml"
    table.write_text(yaml.safe_dump({path: float(ratio) for path, (ratio, _) in paths.items()}))
    copies: dict[str, dict[int, list[int]]] = {path: {} for path in paths}
    first = SampleStage(str(tmp_path / "all"), str(tmp_path / "out"), ratios=str(table))
    sizes: dict[str, list[int]] = {path: [] for path in paths}
    chosen = []
    for epoch in range(EPOCHS):
        report = replace(first, epoch=epoch).run(overwrite=True)
        assert report.settings["ratios"] == {"b": "5/2", "web/a": "37/100"}
        rows = read(tmp_path / "out")
        for row in rows:
            copies[row["dataset"]].setdefault(row["sample_id"], []).append(row["copy"])
        chosen.append(frozenset(row["sample_id"] for row in rows if row["dataset"] == "web/a"))
        for path in paths:
            sizes[path].append(sum(row["dataset"] == path for row in rows))
    for path, (ratio, count) in paths.items():
        for epochs in range(1, EPOCHS + 1):  # in total, after any number of epochs
            assert abs(sum(sizes[path][:epochs]) - count * epochs * ratio) < 1
        used = copies[path]
        assert len(used) == count  # nobody starves
        for numbers in used.values():
            assert sorted(numbers) == list(range(len(numbers)))  # copies are numbered on and on
            assert abs(len(numbers) - EPOCHS * ratio) < 1
    assert len(set(chosen)) == EPOCHS  # epochs differ


def test_an_epoch_is_as_the_formula_says(spark: SparkSession, tmp_path: Path) -> None:
    raw = Raw(tmp_path / "filtered", 57)
    table = tmp_path / "ratios.yaml"
    table.write_text(".: 0.3\n")
    stage = SampleStage(str(tmp_path / "filtered"), str(tmp_path / "out"), epoch=4, seed=1, ratios=str(table))
    stage.run()
    ratio = Fraction("0.3")
    wanted = sum(copies_before(rank, 57, ratio, 5) - copies_before(rank, 57, ratio, 4) for rank in range(57))
    one = {row["sample_id"] for row in read(tmp_path / "out")}
    assert len(one) == wanted
    assert one < set(raw.rows)
    replace(stage, seed=2).run(overwrite=True)
    assert {row["sample_id"] for row in read(tmp_path / "out")} != one


def test_unknown_data_path_lists_what_is_known(spark: SparkSession, tmp_path: Path) -> None:
    Raw(tmp_path / "all/a", 4)
    Raw(tmp_path / "all/b", 4)
    (tmp_path / "ratios.yaml").write_text("a: 1\nc: 2\n")
    with pytest.raises(UserError, match=r"data path b; ratios are known for a: 1, c: 2"):
        SampleStage(str(tmp_path / "all"), str(tmp_path / "out"), ratios=str(tmp_path / "ratios.yaml")).run()
    (tmp_path / "ratios.yaml").write_text("a: 1\nb: -2\n")
    with pytest.raises(UserError, match=r"ratio of b is -2"):
        SampleStage(str(tmp_path / "all"), str(tmp_path / "out"), ratios=str(tmp_path / "ratios.yaml")).run()
