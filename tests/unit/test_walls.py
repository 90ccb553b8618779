"""Walls that import-linter cannot see: it knows other people's packages by their first name only."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for package in ("kanyun", "pipeline", "trainer", "convert", "jobs") for path in (ROOT / package).rglob("*.py")
]


def imported(source: str) -> Iterator[str]:
    """Return the dotted names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_megatron_training_is_not_imported(path: Path) -> None:
    names = [name for name in imported(path.read_text()) if f"{name}.".startswith("megatron.training.")]
    assert names == []


def test_every_way_to_import_it_is_seen() -> None:
    source = (
        "import megatron.training\nfrom megatron import training\ndef f():\n    from megatron.training.x import y\n"
    )
    assert list(imported(source)) == ["megatron.training", "megatron.training", "megatron.training.x.y"]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_module_is_imported(path: Path) -> None:
    """What tests share is in tests/support: a test can be moved, renamed or run alone."""
    names = [name.split(".") for name in imported(path.read_text())]
    assert [name for name in names if name[0] == "tests" and name[1] != "support"] == []


EXAMPLES = {
    "pipeline/datasets/captions.py",
    "pipeline/readers/NAME.py",
    "pipeline/stages/NAME.py",
    "jobs/spark_NAME.sh",
}
PACKAGES = "kanyun|pipeline|trainer|convert|jobs|tests|benchmarks|docs|docker"


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *SOURCES], ids=lambda path: path.name)
def test_files_named_in_words_exist(path: Path) -> None:
    """Documents, docstrings and comments follow when a file moves."""
    named = set(re.findall(rf"(?<![\w/.-])(?:{PACKAGES})/[\w/]+\.(?:py|md|sh|yaml)\b", path.read_text()))
    assert [name for name in sorted(named - EXAMPLES) if not (ROOT / name).exists()] == []
