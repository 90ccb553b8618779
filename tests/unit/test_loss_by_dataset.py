"""The loss of each dataset: the sums add up to the loss of all, and are what each dataset's tokens give alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.packed_data import DATASETS, MODEL, random_packs, random_sample, write_packed
from tests.support.training_job import LENGTH, metrics_of, write_job
from trainer.config import TrainConfig
from trainer.data.batch import BatchFormat, make_batch
from trainer.data.source import PackedData
from trainer.metrics.by_dataset import MOST, OTHER, DatasetSums, told_apart
from trainer.runtime import Runtime
from trainer.trainer import Run, Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("job")
    return write_job(folder, images=False) | {"steps": 2, "validate_every": 1}


@pytest.fixture(scope="module")
def trainer(values: dict[str, Any]) -> Iterator[Trainer]:
    run = Run.prepare(TrainConfig(**values), world_size=1, cuda=False)
    with Runtime.start(seed=0) as runtime, Trainer(run, runtime) as made:
        yield made


def test_the_sums_are_those_of_each_dataset_alone(trainer: Trainer) -> None:
    batches = next(trainer.stream.batches(0))
    expected: dict[str, float] = {}
    with torch.no_grad():
        total = sum(trainer.model(batch).item() for batch in batches)
        for number, name in enumerate(DATASETS):
            alone = [replace(b, loss_mask=b.loss_mask * (b.datasets == number)) for b in batches]
            expected[name] = sum(trainer.model(batch).item() for batch in alone)
    losses = trainer.train_step(batches, 0.0).losses
    assert losses.by_dataset.keys() == losses.tokens_by_dataset.keys() == set(DATASETS)
    sums = {name: losses.by_dataset[name] * losses.tokens_by_dataset[name] for name in DATASETS}
    assert sums == pytest.approx(expected, rel=1e-6)
    assert abs(losses.by_dataset["made"] - losses.by_dataset["drawn"]) > 1e-4  # a mix-up would show
    assert sum(sums.values()) == pytest.approx(losses.mean * losses.tokens, rel=1e-6) == pytest.approx(total, rel=1e-6)
    assert sum(losses.tokens_by_dataset.values()) == losses.tokens == sum(b.loss_mask.sum().item() for b in batches)


def test_a_run_writes_them_of_every_step_and_of_held_out_data(trainer: Trainer, values: dict[str, Any]) -> None:
    trainer.train()
    lines = metrics_of(values)
    assert [line["events"] for line in lines] == [["start"], ["save"]]
    for line in lines:
        assert line["steps"] == 2
        assert sum(line["tokens_by_dataset"].values()) == line["trained_tokens"]
        weighted = sum(line["loss_by_dataset"][name] * count for name, count in line["tokens_by_dataset"].items())
        assert weighted / line["trained_tokens"] == pytest.approx(line["loss"], rel=1e-6)
        held_out = line["validation_loss_by_dataset"]
        assert held_out.keys() == set(DATASETS)
        assert min(held_out.values()) < line["validation_loss"] < max(held_out.values())


def test_every_slot_has_the_number_of_its_sample(tmp_path: Path) -> None:
    write_packed(tmp_path, random_packs(5, 9, LENGTH, images=False), LENGTH, shards=1)
    packs = PackedData(str(tmp_path), LENGTH, MODEL).all
    read = [pack for number in range(len(packs.packs_per_batch)) for pack in packs.read_batch(number)]
    batch = make_batch(read, BatchFormat(None, datasets=("drawn",)))
    assert batch.datasets.dtype == torch.uint8
    expected: list[int | None] = []
    for pack in read:
        for name, start, end in zip(pack.dataset, pack.cu_seqlens, pack.cu_seqlens[1:], strict=False):
            expected += [int(name != "drawn")] * int(end - start)  # "made" has no name here: one past the end
        expected += [None] * (LENGTH - pack.tokens)
    found = batch.datasets.tolist()
    assert [n for n, e in zip(found, expected, strict=True) if e is not None] == [e for e in expected if e is not None]
    assert {n for n, e in zip(found, expected, strict=True) if e is None} <= {0, 1}  # nothing is trained there


def test_of_too_many_datasets_the_last_by_name_are_counted_together() -> None:
    many = SimpleNamespace(names={f"data/{number:03}" for number in range(100)})
    names = told_apart(many, None)
    assert names == tuple(f"data/{number:03}" for number in range(MOST - 1))
    sums, slots = DatasetSums(names, CPU), torch.arange(100)
    batch = SimpleNamespace(datasets=slots.clamp(max=MOST - 1).to(torch.uint8), loss_mask=torch.ones(100))
    sums.add(batch, slots.float())
    losses = sums.losses(sums.values.flatten().tolist())
    assert len(losses.by_dataset) == MOST
    assert losses.by_dataset["data/030"] == 30
    assert losses.by_dataset[OTHER] == np.mean(range(31, 100))
    assert losses.tokens_by_dataset[OTHER] == 69
    assert losses.mean == np.mean(range(100))


def test_a_loss_that_is_not_finite_stays_with_its_dataset() -> None:
    sums = DatasetSums(DATASETS, CPU)
    batch = SimpleNamespace(datasets=torch.tensor([0, 0, 1, 1], dtype=torch.uint8), loss_mask=torch.ones(4))
    sums.add(batch, torch.tensor([1.0, 3.0, float("inf"), 1.0]))
    losses = sums.losses(sums.values.flatten().tolist())
    assert losses.by_dataset == {"drawn": 2.0, "made": float("inf")}
    assert losses.tokens_by_dataset == {"drawn": 2, "made": 2}  # none of another: no such entry


def test_names_are_the_data_paths_or_of_a_single_output_its_dataset_class(tmp_path: Path) -> None:
    write_packed(tmp_path / "paths", random_packs(1, 4, LENGTH, images=False), LENGTH)
    assert PackedData(str(tmp_path / "paths"), LENGTH, MODEL).names == set(DATASETS)
    sample = random_sample(np.random.default_rng(0), 1, 9)
    write_packed(tmp_path / "one", [[replace(sample, dataset="llava")]], LENGTH, ratios={".": "1"})
    assert PackedData(str(tmp_path / "one"), LENGTH, MODEL).names == {"llava"}
