"""Three data paths with equal file names, ratios below and above 1, two epochs: one digest, however it is run."""

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from jobs.cluster import Cluster
from kanyun.storage import Folder
from kanyun.transfer import copy_folder
from kanyun.verify import verify
from pipeline.recipe import Recipe
from pipeline.spark import map_rows, read_parquet
from pipeline.stages import base
from tests.support.qwen_assets import tiny_text_folder
from tests.support.spark_sessions import COMPILED, spark_on, spark_on_cluster
from tests.support.two_epochs import two_epochs

RATIOS = {"_extra": 0.7, "web/en": 1.4, "web/de": 1}
ROWS = 50
SMALL_SPLITS = {"spark__sql__files__maxPartitionBytes": "3000"}


def write_raw(root: Path, *, backwards: bool = False) -> None:
    """train.jsonl and more.jsonl in each data path, whose rows have equal positions; as texts, all differ."""
    for path in sorted(RATIOS, reverse=backwards):
        (root / path).mkdir(parents=True)
        for name in sorted(["train.jsonl", "more.jsonl"], reverse=backwards):
            rng = random.Random(f"{path} {name}")
            texts = (" ".join(rng.choices(["data", "road", "tree"], k=10)) for _ in range(ROWS))
            (root / path / name).write_text("".join(json.dumps({"text": f"{text:59}"}) + "\n" for text in texts))


def write_recipe(here: Path, raw: str, output: str, model: Path) -> str:
    datasets = {path: {"raw": f"{raw}/{path}", "dataset": "text", "ratio": ratio} for path, ratio in RATIOS.items()}
    values = {"output": output, "tokenizer": str(model), "length": 64, "seed": 5, "datasets": datasets}
    here.mkdir(exist_ok=True)
    (here / "recipe.yaml").write_text(json.dumps(values))  # JSON is YAML
    return str(here / "recipe.yaml")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw folder and a tokenizer."""
    here = tmp_path_factory.mktemp("digest")
    write_raw(here / "raw")
    tiny_text_folder(here / "hf")
    return here


@pytest.fixture(scope="module")
def usual(here: Path, spark: SparkSession, shared: Path) -> Path:
    """The output of a run on the session of all tests; its digests go to `shared`."""
    recipe = Recipe.load(write_recipe(here / "usual", str(here / "raw"), str(here / "usual/out"), here / "hf"))
    digests = " ".join(two_epochs(recipe))
    shared.with_suffix(f".{os.getpid()}").write_text(digests)
    shared.with_suffix(f".{os.getpid()}").rename(shared)
    return here / "usual/out"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for all processes of this run of the tests."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if run else folder) / f"recipe-digests-{run}"


@pytest.fixture
def digests(request: pytest.FixtureRequest, spark: SparkSession, shared: Path) -> list[str]:
    """Of both epochs: those of another process of pytest-xdist, if it has them, or of `usual` here."""
    if not shared.exists():
        request.getfixturevalue("usual")
    return shared.read_text().split()


def test_every_row_is_a_sample_of_its_own(usual: Path) -> None:
    for epoch, folder in enumerate(("sample", "sample-1")):
        rows = pq.read_table(usual / folder / "data", columns=["sample_id", "dataset", "file", "position"]).to_pylist()
        ids = {row["sample_id"]: (row["dataset"], row["file"], row["position"]) for row in rows}
        assert len(set(ids.values())) == len(ids), "as many ids as rows"
        by_path = {path: sum(row["dataset"] == path for row in rows) for path in RATIOS}
        count = 2 * ROWS
        assert by_path == {p: int(count * r * (epoch + 1)) - int(count * r * epoch) for p, r in RATIOS.items()}
        facts = json.loads((usual / folder / "report.json").read_text())["facts"]
        assert facts["data path web/en"] == f"{count} rows x 7/5 = {by_path['web/en']} copies"
        assert list(facts) == [f"data path {path}" for path in sorted(RATIOS)]
    for packed in (usual / "packed").iterdir():
        assert list(verify(Folder(str(packed)))) == []


@pytest.mark.parametrize(
    ("master", "settings", "shuffled", "backwards"),
    [("local[1]", COMPILED, 4, True), ("local[4]", SMALL_SPLITS, 7, False)],
)
def test_one_digest_on_any_number_of_cores(
    master: str,
    settings: dict[str, str],
    shuffled: int,
    backwards: bool,
    here: Path,
    digests: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in other splits, in other partitions behind a shuffle, from files that were made in another order, and where
    Spark compiles its queries, as it does for users."""
    monkeypatch.setattr(base, "SHUFFLE_PARTITIONS", shuffled)
    write_raw(tmp_path / "raw", backwards=backwards)
    recipe = write_recipe(tmp_path, str(tmp_path / "raw"), str(tmp_path / "out"), here / "hf")
    with spark_on(master, **settings):
        assert two_epochs(Recipe.load(recipe)) == digests


def test_one_digest_with_files_that_are_listed_in_another_order(
    here: Path, usual: Path, digests: list[str], tmp_path: Path
) -> None:
    """Preprocess and filter are done; the parquet files of filter are named from the last to the first."""
    shutil.copytree(usual, tmp_path / "out", ignore=shutil.ignore_patterns("sample*", "build*", "packed*"))
    for path in RATIOS:
        files = sorted((tmp_path / "out/filter" / path / "data").glob("*.parquet"))
        assert len(files) > 1
        for number, file in enumerate(files):
            file.rename(file.with_name(f"part-{len(files) - number:05}.zstd.parquet"))
    recipe = Recipe.load(write_recipe(tmp_path, str(here / "raw"), str(tmp_path / "out"), here / "hf"))
    assert two_epochs(recipe) == digests


def test_the_cluster_runs_our_code_and_makes_the_same_digest(
    cluster: Cluster, here: Path, digests: list[str], tmp_path: Path
) -> None:
    root = Folder(f"{cluster.hdfs}/{tmp_path.name}")
    copy_folder(Folder(str(here / "raw")), root / "raw", "put")
    recipe = write_recipe(tmp_path, (root / "raw").uri, (root / "out").uri, here / "hf")
    with spark_on_cluster(cluster) as session:
        squares(session, root)
        assert two_epochs(Recipe.load(recipe)) == digests
    deadline = time.monotonic() + 60
    while cluster.executors():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    copy_folder(root / "squares", Folder(str(tmp_path / "squares")), "fetch")
    rows = pq.read_table(str(tmp_path / "squares")).to_pydict()
    assert sorted(rows["square"]) == [i * i for i in range(1000)]
    assert set(rows["master"]) == {cluster.spark}
    assert set(rows["code"]) == {"./kanyun_code.zip/kanyun/storage/__init__.py"}, "the session's, not an installed one"


def squares(session: SparkSession, root: Folder) -> None:
    """Write rows to HDFS, read them there, and map them by a function that imports code of ours on the executors."""
    master = session.sparkContext.master
    schema = pa.schema([("square", pa.int64()), ("code", pa.string()), ("master", pa.string())])

    def square(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import kanyun.storage

        for batch in batches:
            ids = batch["id"].to_pylist()
            columns = [[i * i for i in ids], [kanyun.storage.__file__] * len(ids), [master] * len(ids)]
            yield pa.record_batch(columns, schema)

    session.range(0, 1000, 1, 4).write.parquet((root / "numbers").uri)
    rows = map_rows(read_parquet(root / "numbers"), square, schema)
    rows.write.parquet((root / "squares").uri)
