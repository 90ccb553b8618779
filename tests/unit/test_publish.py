"""What pip installs: all four packages with their files, console scripts, one version; why each dependency is there."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kanyun", "pipeline", "trainer", "convert")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of a copy: setuptools writes beside what it reads. The pinned setuptools is the environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, str(folder / "source")], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    assert wheel.name.startswith(f"kanyun-{PROJECT['version']}-")
    have = {
        name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(PACKAGES) and ".dist-info/" not in name
    }
    there = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    assert have == {str(path.relative_to(ROOT)) for path in there if "__pycache__" not in path.parts}
    assert {
        "pipeline/log4j2.properties",
        "pipeline/reports/templates/report.html",
        "trainer/report/template.html",
        "kanyun/py.typed",
    } <= have


def test_console_scripts_run_away_from_the_clone(wheel: Path, tmp_path: Path) -> None:
    """Installed in a folder; the dependencies are this environment's."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    for script in PROJECT["scripts"]:
        command = [tmp_path / "site/bin" / script, "--help"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.startswith(f"usage: {script} "), done.stderr
        assert f"\n  {script} " in done.stdout, "the example is of this command"
    where = (
        "import kanyun, pipeline.stages.table as p, trainer.config as t; print(kanyun.__file__, p.__file__, t.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert all(path.startswith(str(tmp_path)) for path in done.stdout.split())


def direct_dependencies() -> set[str]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return {name for names in lists for name in names if not name.startswith("kanyun[")}


def test_every_dependency_is_pinned_and_has_its_reason() -> None:
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split()}
    assert [name for name in direct_dependencies() if name.lower() not in pinned] == []
    table = (ROOT / "docs/design.md").read_text().partition("## Dependencies")[2]
    rows = re.findall(r"^\| `([\w.-]+)` \| (.{4,}) \|$", table, re.MULTILINE)
    assert {name for name, _ in rows} == direct_dependencies()


def test_security_is_ten_lines() -> None:
    lines = (ROOT / "SECURITY.md").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 10
