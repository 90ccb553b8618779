"""A stranger's path: README's commands from top to bottom, in a copy of the repository, with this machine as the site.

`make test-readme` runs it; it takes the time of both demos and of six jobs on YARN, and `-s` shows what it is at.
README_DEMO=FOLDER takes a demo/ that is there already. Blocks are the same in both languages, which
tests/unit/test_documents.py holds, so they are run once.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cluster import Cluster
from jobs.daemons import free_ports
from jobs.hadoop import SPARK_HOME, minicluster_jar
from kanyun.manifest import Manifest
from kanyun.naming import discover
from tests.support.spark_sessions import JAVA_OPTIONS
from tests.support.yarn import Yarn, yarn_on

ROOT = Path(__file__).parents[2]
# It compiles Transformer Engine against CUDA, which a machine without a GPU does not have.
LEFT_OUT = ("make setup-gpu",)

pytestmark = pytest.mark.skipif("README_DEMO" not in os.environ, reason="make test-readme runs it")


@pytest.fixture
def yarn(cluster: Cluster, tmp_path: Path) -> Iterator[Yarn]:
    with yarn_on(cluster, tmp_path / "yarn", queue="etl") as running:
        yield running


def here(cluster: Cluster, yarn: Yarn) -> dict[str, str]:
    """What README says of a site, its data and its model -> the same on this machine."""
    options = (
        "--num-executors 1 --executor-memory 1g --conf spark.executor.extraJavaOptions=-XX:TieredStopAtLevel=1"
        f" --conf spark.yarn.jars=local:{SPARK_HOME}/jars/*"  # or each job sends 400 MB to HDFS
    )
    return {
        "--num-executors 40 --executor-cores 4 --executor-memory 8g": options,
        "/etc/hadoop/conf": str(yarn.conf),
        "hdfs://namenode:9820": cluster.hdfs,
        " raw/charts ": " demo/validation/digits ",
        "dataset: llava": "dataset: messages",
        "--dataset llava": "--dataset messages",
        "models/Qwen2.5-VL-3B-Instruct": "demo/hf",
        "length: 8192": "length: 1024",
        "--length 8192": "--length 1024",
        "qwen2_5_vl_3b.yaml ": "qwen2_5_vl_3b.yaml model=demo/hf length=1024 global_batch=2 ",
    }


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def environment(cache: Path) -> dict[str, str]:
    """That of a new shell: without what tests/conftest.py sets (but its quick starts of Java), and what make hands down
    to every make. `make cluster-up` starts its daemons in `cache`, beside those that run already."""
    tests = ("SPARK_", "KANYUN_", "HF_", "OMP_", "MAKE", "MFLAGS", "ARGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(tests)}
    ports = {name.upper(): str(port) for name, port in free_ports().items()}
    return kept | ports | {"KANYUN_CACHE": str(cache), "SPARK_SUBMIT_OPTS": JAVA_OPTIONS}


@pytest.mark.timeout(7200)
def test_every_command_from_top_to_bottom(cluster: Cluster, yarn: Yarn, tmp_path: Path) -> None:
    copy, cache = tmp_path / "kanyun", tmp_path / "cache"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    (copy / ".venv").symlink_to((ROOT / ".venv").resolve())
    for file in copy.rglob("*"):  # older than .venv/installed: make has nothing to install
        if file.is_file() and not file.is_symlink() and ".venv" not in file.parts:
            os.utime(file, (1.6e9, 1.6e9))
    cache.mkdir()
    (cache / minicluster_jar().name).symlink_to(minicluster_jar())

    text = (copy / "README.md").read_text()
    for theirs, ours in here(cluster, yarn).items():
        assert theirs in text
        text = text.replace(theirs, ours)
    for recipe in blocks(text, "yaml"):
        (copy / recipe.split()[1]).write_text(recipe)  # it begins with `# NAME`
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    left_out: tuple[str, ...] = LEFT_OUT
    if demo := os.environ["README_DEMO"]:
        shutil.copytree(demo, copy / "demo")
        left_out += ("make demo",)
    script = "set -euxo pipefail\n" + "\n".join(line for line in lines if not line.startswith(left_out))
    try:
        subprocess.run(["bash", "-c", script], cwd=copy, env=environment(cache), check=True)
        assert not Cluster(cache / "cluster").running()
    finally:
        Cluster(cache / "cluster").down()

    assert "<svg" in (copy / "runs/mine/report.html").read_text()
    assert "data:image" in (copy / "packs.html").read_text()
    assert (copy / "runs/mine_hf/config.json").exists()
    assert (copy / "runs/vl_hf/config.json").exists()
    # The recipe, and the same stages one by one: six jobs of YARN, the same packs.
    jobs = [(job["queue"], job["finalStatus"]) for job in yarn.applications()]
    assert jobs == [("root.etl", "SUCCEEDED")] * 6
    made = [discover(f"{cluster.hdfs}/{parent}/packed") for parent in ("charts", "stages")]
    first, second = (Manifest.load(packed).content_digest for (packed,) in made)
    assert first == second
