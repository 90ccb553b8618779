"""Recipes: what is refused before any work."""

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
