"""A stranger's path: README's first screen and its laptop, from top to bottom, in a copy of the repository.

`make test-readme` runs it; it takes the time of both demos and a few minutes more, and `-s` shows what it is at.
README_DEMO=FOLDER takes a demo/ that is there already. Blocks are the same in both languages, which
tests/unit/test_documents.py holds, so they are run once.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = "## On a cluster"  # where the laptop ends

pytestmark = pytest.mark.skipif("README_DEMO" not in os.environ, reason="make test-readme runs it")


@pytest.mark.timeout(7200)
def test_the_commands_of_the_laptop_from_top_to_bottom(tmp_path: Path) -> None:
    copy = tmp_path / "kanyun"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    (copy / ".venv").symlink_to((ROOT / ".venv").resolve())
    for file in copy.rglob("*"):  # older than .venv/installed: make has nothing to install
        if file.is_file() and not file.is_symlink() and ".venv" not in file.parts:
            os.utime(file, (1.6e9, 1.6e9))
    text = (copy / "README.md").read_text().split(SECTION)[0]
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (copy / "my_recipe.yaml").write_text(recipe)
    lines = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    if demo := os.environ["README_DEMO"]:
        shutil.copytree(demo, copy / "demo")
        lines = [line for line in lines if not line.startswith("make demo")]
    script = "set -euo pipefail\n" + "\n".join(lines)
    # Without what `make test-readme ARGS=-s` hands down to every make.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "ARGS")}
    subprocess.run(["bash", "-c", script], cwd=copy, env=environment, check=True)
    assert "<svg" in (copy / "runs/mine/report.html").read_text()
    assert (copy / "runs/mine_hf/config.json").exists()
    assert "data:image" in (copy / "packs.html").read_text()
