"""The three scripts of examples/, one after the other, as their docstrings say."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_it_is_started(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    assert f"python -m examples.{path.stem} OUT" in lines[0]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_an_example_without_a_folder_says_how_it_is_started(
    path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [path.name, *arguments])
    with pytest.raises(SystemExit, match=f"python -m examples.{path.stem} OUT"):
        runpy.run_module(f"examples.{path.stem}", run_name="__main__")


def test_from_five_rows_to_answers(
    spark: "SparkSession", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def run(name: str, argument: Path) -> str:
        """Run an example in this process: the stages find its Spark session."""
        monkeypatch.setattr(sys, "argv", [name, str(argument)])
        capsys.readouterr()
        runpy.run_module(f"examples.{name}", run_name="__main__")
        return capsys.readouterr().out

    run("rows_to_packs", out)
    (packed,) = (out / "work/packed").iterdir()
    assert (out / "packs.html").read_text().count("<img ") == 16, "four scans, four times each"
    read = run("read_packs", packed)
    assert len(re.findall(r"^  digits: \d+ tokens, [1-9]\d* of them trained$", read, re.MULTILINE)) == 16
    assert len(re.findall(r"^  documents: ", read, re.MULTILINE)) == 1
    assert len(re.findall(r"^    an image of 8 x 8 patches", read, re.MULTILINE)) == 16
    command = [sys.executable, "-m", "examples.train_and_ask", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    words = ("Zero", "One", "Two", "Three")
    assert done.stdout.splitlines()[-4:] == [f"{word}.png: {word}" for word in words]
