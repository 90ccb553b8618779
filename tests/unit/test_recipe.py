"""Recipes: what is refused before any work."""

from dataclasses import replace
from pathlib import Path

import pytest

from kanyun.errors import UserError
from pipeline.recipe import Recipe

HEAD = "output: o\ntokenizer: t\nlength: 8\ndatasets:\n"


def load(tmp_path: Path, datasets: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(HEAD + datasets)
    return Recipe.load(str(tmp_path / "recipe.yaml"))


def test_names_are_text_as_written(tmp_path: Path) -> None:
    recipe = load(tmp_path, "  no: {raw: a, dataset: text}\n  010: {raw: b, dataset: text, ratio: 1e-7}\n")
    assert list(recipe.datasets) == ["no", "010"]
    assert recipe.datasets["010"].ratio == 1e-7


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["web/en", "web"], "the outputs of web/en would lie in those of web"),
        (["a", "a/b/c"], "the outputs of a/b/c would lie in those of a"),
        (["../a"], "'../a' is no name for a dataset"),
        (["/a"], "'/a' is no name"),
        (["a//b"], "'a//b' is no name"),
        (["a/"], "'a/' is no name"),
        ([f"_attempt-a-{'0' * 32}"], "is no name"),
        (["a", "a"], "key 'a' occurs twice"),
        (["report.json"], "'report.json' is no name"),
        (['"a\\0"'], "is no name"),
        (['"a\\ud83d"'], "is no name"),
        (["é" * 101], "has 202 bytes, a name may have 200"),
    ],
)
def test_names_that_no_folder_can_have(names: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        load(tmp_path, "".join(f"  {name}: {{raw: r, dataset: text}}\n" for name in names))


def test_names_side_by_side_and_with_a_mark_in_front_are_taken(tmp_path: Path) -> None:
    names = ["_extra", ".hidden", "web/en", "web/de", "we"]
    recipe = load(tmp_path, "".join(f"  {name}: {{raw: r, dataset: text}}\n" for name in names))
    assert list(recipe.datasets) == names


@pytest.mark.parametrize("ratio", ["-1", "1001", ".nan", "1e-10"])
def test_ratios_are_checked_at_once(ratio: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the sampling ratio of a is"):
        load(tmp_path, f"  a: {{raw: r, dataset: text, ratio: {ratio}}}\n")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("length: 0", "recipe.yaml: length is 0: give a number from 1 to 16777216"),
        ("length: 1:30", "length is '1:30', a whole number is needed"),
        ("length: 8_192", "length is '8_192', a whole number"),
        ("seed: 9223372036854775808", "seed is 9223372036854775808: give a number from"),
        ("epoch: -1", "epoch is -1: give"),
        ("part: -1", "part is -1: give"),
        ("overflow: Split", "overflow is 'Split': give drop or split"),
        ("near_duplicates: no", "near_duplicates is 'no': give keep or drop"),
        ('tokenizer: "a\\0b"', "tokenizer is 'a.x00b', which has characters that no path should have"),
        ("seed: " + "[" * 5000, "recipe.yaml is not YAML"),
    ],
)
def test_settings_are_checked_before_any_work(line: str, sentence: str, tmp_path: Path) -> None:
    head = "".join(f"{one}\n" for one in HEAD.splitlines()[:-1] if one.split(":")[0] != line.split(":")[0])
    (tmp_path / "recipe.yaml").write_text(f"{head}{line}\ndatasets: {{a: {{raw: r, dataset: text}}}}\n")
    with pytest.raises(UserError, match=sentence):
        Recipe.load(str(tmp_path / "recipe.yaml"))


def test_a_dataset_class_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown dataset 'Text', known are llava, messages, text"):
        load(tmp_path, "  a: {raw: r, dataset: Text}\n")


def test_numbers_are_those_that_are_written(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, "  a: {raw: 2024-01-01, dataset: text, ratio: 010}\n  b: {raw: no, dataset: text, ratio: .5}\n"
    )
    assert [(one.raw, one.ratio) for one in recipe.datasets.values()] == [("2024-01-01", 10), ("no", 0.5)]


def test_raw_folders_and_the_tokenizer_are_looked_at_first(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    recipe = load(
        tmp_path, f"  a: {{raw: {tmp_path}/r, dataset: text}}\n  b: {{raw: {tmp_path}/none, dataset: text}}\n"
    )
    with pytest.raises(UserError, match=r"the raw folder .*none does not exist"):
        recipe.run(overwrite=False)
    recipe = load(tmp_path, f"  a: {{raw: {tmp_path}/r, dataset: text}}\n")
    with pytest.raises(UserError, match="tokenizer"):
        recipe.run(overwrite=False)


def test_outputs_of_all_datasets_are_looked_at_first(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    recipe = load(tmp_path, f"  a: {{raw: {tmp_path}/r, dataset: text}}\n  b: {{raw: {tmp_path}, dataset: text}}\n")
    within = replace(recipe, output=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"the output .*/out/preprocess/b is in the raw folder"):
        within.run(overwrite=False)
    colon = replace(recipe, output="hdfs://127.0.0.1:1/out", datasets={"a:b": recipe.datasets["a"]})
    with pytest.raises(UserError, match=r"the output /out/preprocess/a:b has a colon, which HDFS takes in no name"):
        colon.run(overwrite=False)
