"""Packs and a checkpoint of an earlier version of the code load, and packs can be read without it: see tests/data."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kanyun.manifest import Manifest
from kanyun.reader import PackedDataset
from kanyun.storage import Folder
from kanyun.verify import verify
from tests.support.packed_data import random_packs, write_packed
from tests.support.plain_reader import PlainDataset, images, segments
from tests.support.training_job import metrics_of, train
from trainer.checkpoint.reader import load
from trainer.config import TrainConfig
from trainer.data.batch import BatchFormat, make_batch
from trainer.models.initialize import build_model
from trainer.runtime import Runtime
from trainer.trainer import Run

OLD = Path(__file__).parents[1] / "data" / "before_regrouping"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())
PACKED = OLD / "packed" / EXPECTED["packs"]["folder"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_old_packs_hold_what_they_held() -> None:
    expected = EXPECTED["packs"]
    folder = Folder(str(PACKED))
    assert list(verify(folder)) == []
    assert Manifest.load(folder).content_digest == expected["content_digest"]
    dataset = PackedDataset(folder)
    packs = [pack for number in range(len(dataset)) for pack in dataset.read_batch(number)]
    assert packs[0].input_ids[: len(expected["first_input_ids"])].tolist() == expected["first_input_ids"]
    assert [sha256(pack.input_ids.astype("<i4").tobytes()) for pack in packs] == expected["input_ids"]
    assert [int(pack.loss_mask.sum()) for pack in packs] == expected["trained_tokens"]
    assert [pack.cu_seqlens.tolist() for pack in packs] == expected["cu_seqlens"]
    assert [pack.image_grid_thw.tolist() for pack in packs] == expected["image_grid_thw"]
    assert [[sha256(image) for image in pack.images] for pack in packs] == expected["images"]


@pytest.fixture
def old_run(tmp_path: Path) -> dict[str, Any]:
    """A copy of the old run, stopped after step 2 of 4, and the values of its config."""
    shutil.copytree(OLD / "run", tmp_path / "run")
    hf = OLD / "run" / "checkpoints" / "step_00000002" / "hf"
    places = {"model": str(hf), "data": str(OLD / "packed"), "output": str(tmp_path / "run")}
    return EXPECTED["run"]["config"] | places


def test_an_old_checkpoint_has_the_weights_it_had(old_run: dict[str, Any]) -> None:
    run = Run.prepare(TrainConfig(**old_run), world=1, cuda=False)
    assert run.resume is not None
    with Runtime.start(seed=9) as runtime:
        model = build_model(run.model, runtime)
        load(run.resume, model)
        norms = {name: weight.detach().double().norm().item() for name, weight in model.named_parameters()}
    assert norms == pytest.approx(EXPECTED["run"]["parameter_norms"], rel=1e-6, abs=1e-9)


def test_an_old_run_goes_on_as_it_would_have(old_run: dict[str, Any]) -> None:
    """Steps 3 and 4 need the weights, the optimizer's state, the schedule and the position in the data."""
    train(old_run)
    expected = EXPECTED["run"]["steps"][2:]
    steps = metrics_of(old_run)
    assert [step["step"] for step in steps] == [3, 4]
    for step, old in zip(steps, expected, strict=True):
        assert step["trained_tokens"] == old["trained_tokens"]
        for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("lr", 1e-9)):
            assert step[name] == pytest.approx(old[name], rel=tolerance), name


@pytest.fixture(params=["old", "new"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A packed folder: the old one, and one of several shards with several record batches, written today."""
    if request.param == "old":
        return PACKED
    with pytest.MonkeyPatch.context() as small:
        small.setattr("kanyun.writer.BATCH_BYTES", 20_000)
        write_packed(tmp_path, random_packs(7, 24, 128), 128, shards=3)
    return next(tmp_path.iterdir())


def test_a_reader_made_from_the_document_reads_the_same(packed: Path) -> None:
    """Every column of every pack, and the labels and image places that the document derives from them."""
    dataset, plain = PackedDataset(Folder(str(packed))), PlainDataset(packed)
    assert packed == PACKED or len(plain.batches) > len(plain.manifest["shards"]) == 3
    packs = [pack for number in range(len(dataset)) for pack in dataset.read_batch(number)]
    rows = list(plain.packs())
    assert len(rows) == len(packs) == plain.manifest["packs"] > 3
    merge = (plain.manifest["processor"] or {"merge_size": 2})["merge_size"]
    image_token = plain.manifest["image_token_id"]
    for row, pack in zip(rows, packs, strict=True):
        assert {name: _plain(value) for name, value in vars(pack).items()} == row
        text_only = replace(pack, image_grid_thw=np.empty((0, 3), np.int32), images=[])  # labels ask no image
        batch = make_batch([text_only], BatchFormat(None))
        trained = batch.loss_mask.bool()
        labels = [label for _, of_sample in segments(row) for label in of_sample]
        assert [label is not None for label in labels] == trained[: len(labels)].tolist()
        assert [label for label in labels if label is not None] == batch.labels[trained].tolist()
        found = list(images(row, image_token, merge))
        assert [data for _, data in found] == pack.images
        sizes = pack.image_grid_thw.prod(1) // merge**2
        slots = [slot + n for (slot, _), size in zip(found, sizes) for n in range(size)]
        assert slots == np.flatnonzero(pack.input_ids == image_token).tolist()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
