"""The trainer on packs that are on HDFS: the losses of a run on local ones, also while daemons die. No step is lost."""

from pathlib import Path
from typing import Any

import pytest

from jobs.cluster import Cluster
from kanyun.errors import DatasetError
from kanyun.naming import dataset_name
from kanyun.storage import Folder
from kanyun.transfer import copy_folder
from tests.support.training_job import LENGTH, launch, metrics_of, train, write_job
from trainer.config import TrainConfig
from trainer.runtime import Runtime
from trainer.trainer import Run, StepResult, Trainer

STEPS = 14


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on local packs, a few in a record batch: each step reads some."""
    folder = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kanyun.writer.BATCH_BYTES", 8000)
        values = write_job(folder, images=True, packs=4 * STEPS) | {"steps": STEPS, "validate_every": STEPS}
    train(values)
    return values


@pytest.fixture
def remote(cluster: Cluster, local: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same, all that is read on HDFS."""
    root = Folder(f"{cluster.hdfs}/{tmp_path.name}")
    for name in ("hf", "data", "held_out"):
        copy_folder(Folder(str(Path(local["data"]).parent / name)), root / name, "put")
    uris = {"model": (root / "hf").uri, "data": (root / "data").uri, "validation": (root / "held_out").uri}
    return local | uris | {"output": str(tmp_path / "out")}


def assert_same_curve(values: dict[str, Any], local: dict[str, Any]) -> None:
    lines, wanted = metrics_of(values), metrics_of(local)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "trained_tokens", "validation_loss"):
        assert [line[name] for line in lines] == [line[name] for line in wanted], name


def test_losses_are_those_of_local_packs_and_the_live_line_shows_data_wait(
    remote: dict[str, Any], local: dict[str, Any]
) -> None:
    done = launch(remote)
    assert done.returncode == 0, done.stderr
    assert "data wait " in done.stdout.splitlines()[-1]
    assert_same_curve(remote, local)


def test_no_step_is_lost_when_a_datanode_dies_and_the_namenode_restarts(
    cluster: Cluster, remote: dict[str, Any], local: dict[str, Any]
) -> None:
    class Disturbed(Trainer):
        def train_step(self, *args: Any) -> StepResult:
            if self.step == 3:
                cluster.kill("datanode-1")
            if self.step == 7:
                cluster.stop("namenode")
                cluster.start("namenode")  # takes it some seconds
            return super().train_step(*args)

    run = Run.prepare(TrainConfig(**remote), world_size=1, cuda=False)
    try:
        with Runtime.start(seed=run.config.seed) as runtime, Disturbed(run, runtime) as trainer:
            trainer.train()
    finally:
        cluster.start("datanode-1")
        cluster.wait_for_hdfs()
    assert_same_curve(remote, local)


def test_a_flipped_byte_stops_training_naming_the_place(remote: dict[str, Any]) -> None:
    packed, shard = Folder(remote["data"]) / dataset_name(LENGTH, 0, 0), "shard-00001-of-00002.arrow"
    data = bytearray(packed.read(shard))
    data[len(data) // 2] ^= 1
    packed.write(shard, bytes(data))
    with pytest.raises(DatasetError, match=rf"{shard}, record batch \d+ at byte \d+ .* does not have its checksum"):
        train(remote)
