"""Streams over packed datasets on disk: order, ranks, resume, epochs, errors, threads."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from kanyun.errors import DatasetError, UserError
from kanyun.fingerprint import Fingerprint
from kanyun.naming import dataset_name, shard_name
from kanyun.schema import Pack
from tests.support.packed_data import IMAGE, MODEL, PAD, random_packs, write_packed
from trainer.data.batch import Batch, BatchFormat, make_batch
from trainer.data.source import PackCost, PackedData, Packs
from trainer.data.stream import PackStream, ValidationStream
from trainer.models.qwen2_5.windows import WindowGeometry

LENGTH = 64
FORM = BatchFormat(WindowGeometry(), IMAGE)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Epoch 0 in two parts (30 + 11 packs), epoch 1 in one (25 packs), a few packs a record batch."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kanyun.writer.BATCH_BYTES", 6000)
        write_packed(folder, random_packs(1, 30, LENGTH), LENGTH)
        write_packed(folder, random_packs(2, 11, LENGTH), LENGTH, part=1, shards=1)
        write_packed(folder, random_packs(3, 25, LENGTH), LENGTH, epoch=1)
    return folder


@pytest.fixture
def data(parent: Path) -> PackedData:
    data = PackedData(str(parent), LENGTH, MODEL)
    assert len(data.epochs[0].packs_per_batch) > 8  # several record batches, or order would be trivial
    return data


def stream(data: PackedData, dp_rank: int = 0, dp_size: int = 1, **kwargs: object) -> PackStream:
    settings = {"seed": 5, "global_batch": 8, "micro_batch": 2, **kwargs}
    return PackStream(data, FORM, dp_rank=dp_rank, dp_size=dp_size, **settings)  # type: ignore[arg-type]


def take(data: PackedData, steps: int, consumed: int = 0, **kwargs: object) -> list[tuple[Batch, ...]]:
    with stream(data, **kwargs) as packs:  # type: ignore[arg-type]
        return list(itertools.islice(packs.batches(consumed), steps))


def keys(micro_batches: tuple[Batch, ...]) -> list[tuple[int, ...]]:
    """Return what identifies each pack of a step: its first 24 tokens."""
    return [tuple(ids[:24].tolist()) for batch in micro_batches for ids in batch.input_ids.split(LENGTH)]


def stored(packs: Packs) -> list[Pack]:
    return [pack for number in range(len(packs.packs_per_batch)) for pack in packs.read_batch(number)]


def stored_keys(packs: Packs) -> list[tuple[int, ...]]:
    return [tuple(pack.input_ids[:24].tolist()) for pack in stored(packs)]


def assert_same(a: Batch, b: Batch) -> None:
    for name in ("input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.vision is not None
    assert b.vision is not None
    for mine, other in zip(a.vision.tensors(), b.vision.tensors(), strict=True):
        assert torch.equal(mine, other)


def test_an_epoch_takes_each_pack_at_most_once_and_leaves_less_than_a_step(data: PackedData) -> None:
    with stream(data) as packs:
        assert packs.steps(1) == 5  # 41 packs of both parts
        assert packs.steps(2) == 5 + 3
        assert packs.steps(3) == 5 + 3 + 5
    steps = take(data, 13)
    for first, last, epoch in [(0, 5, 0), (5, 8, 1), (8, 13, 0)]:
        seen = Counter(key for step in steps[first:last] for key in keys(step))
        assert seen.total() == (last - first) * 8
        assert seen <= Counter(stored_keys(data.epochs[epoch]))
    assert [keys(step) for step in steps[:5]] != [keys(step) for step in steps[8:]]  # shuffled anew


def test_parts_are_mixed_and_order_follows_the_seed(data: PackedData) -> None:
    first_part = set(stored_keys(data.epochs[0])[:30])
    steps = take(data, 5)
    mixed = [0 < sum(key in first_part for key in keys(step)) < 8 for step in steps]
    assert sum(mixed) >= 3
    assert [keys(step) for step in steps] == [keys(step) for step in take(data, 5)]
    assert [keys(step) for step in steps] != [keys(step) for step in take(data, 5, seed=6)]


@pytest.mark.parametrize("consumed", [8, 24, 40, 56, 64, 96])
def test_resumes_with_exactly_the_same_batches(data: PackedData, consumed: int) -> None:
    whole = take(data, 14)
    for before, after in zip(whole[consumed // 8 :], take(data, 14 - consumed // 8, consumed), strict=True):
        for a, b in zip(before, after, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("cost", [None, PackCost(1.0, 30.0)])
def test_any_number_of_ranks_gives_the_same_global_batches(data: PackedData, cost: PackCost | None) -> None:
    alone = take(data, 9, cost=cost, micro_batch=1)
    for dp_size, micro_batch in [(2, 2), (4, 1), (8, 1)]:
        ranks = [take(data, 9, dp_rank=r, dp_size=dp_size, micro_batch=micro_batch, cost=cost) for r in range(dp_size)]
        for step in range(9):
            assert len(ranks[0][step]) == 8 // dp_size // micro_batch
            together = [key for rank in ranks for key in keys(rank[step])]
            assert together == keys(alone[step])


def test_imbalance_is_that_of_the_ranks_costs(data: PackedData) -> None:
    def cost(batch: Batch) -> int:
        assert batch.vision is not None
        patches = 4 * (batch.vision.token_index < LENGTH).sum()
        samples = batch.cu_seqlens[: -1 if batch.input_ids[-1] == PAD else None]  # a tail is no sample
        return int((samples.diff() ** 2).sum() + 30 * patches)

    order = {"cost": PackCost(1.0, 30.0), "global_batch": 8, "micro_batch": 1}
    ranks = [
        take(data, 7, dp_rank=rank, dp_size=4, **order) for rank in range(4)
    ]  # 5 steps of one epoch, 2 of the next
    costs = [[sum(map(cost, step)) for step in steps] for steps in ranks]
    with stream(data, dp_rank=2, dp_size=4, **order) as packs:
        found = [packs.imbalance(8 * step) for step in range(7)]
    assert found == pytest.approx([max(of_ranks) / np.mean(of_ranks) for of_ranks in zip(*costs)])
    assert len(set(found)) == 7
    with stream(data, **order) as packs:
        assert packs.imbalance(8) == 1  # one rank alone


def test_cost_evens_out_the_steps(data: PackedData) -> None:
    cost = PackCost(0.0, 1.0)

    def spread(chosen: PackCost | None) -> float:
        steps = take(data, 5, cost=chosen, micro_batch=1)
        patches = [[int((batch.vision.token_index < LENGTH).sum()) for batch in step] for step in steps]
        return float(np.mean([max(step) - min(step) for step in patches]))

    assert spread(cost) < 0.7 * spread(None)


def test_each_record_batch_is_read_about_once(data: PackedData, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[int] = Counter()
    packs = data.epochs[0]
    read = packs.read_batch
    monkeypatch.setattr(packs, "read_batch", lambda number: reads.update([number]) or read(number))
    with stream(data) as alone:
        list(itertools.islice(alone.batches(0), 5))
    assert max(reads.values()) == 1


def test_held_record_batches_are_bounded_in_bytes_and_give_the_same(
    data: PackedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = take(data, 8)
    packs = data.epochs[0]
    sizes = [packs.batch_bytes(number) for number in range(len(packs.packs_per_batch))]
    limit = 2 * max(sizes)
    assert limit < sum(sizes) / 3
    monkeypatch.setattr("trainer.data.loader._HELD_BYTES", limit)
    with stream(data) as bounded:
        loader = bounded._loader
        for before, after in zip(whole, bounded.batches(0)):
            for a, b in zip(before, after, strict=True):
                assert_same(a, b)
            assert sum(owner.batch_bytes(number) for owner, number in loader._held) == loader._held_bytes <= limit


def test_locate(data: PackedData) -> None:
    with stream(data) as packs:
        found = [packs.locate(8 * step) for step in (0, 4, 5, 7, 8, 12, 13, 16, 800)]
        assert found == [(0, 0), (0, 4), (1, 0), (1, 2), (2, 0), (2, 4), (3, 0), (4, 0), (200, 0)]
        with pytest.raises(UserError, match="20 consumed packs are not a whole number of steps of global_batch 8"):
            packs.batches(20)


def test_what_does_not_fit_is_refused_with_both_values(data: PackedData, parent: Path) -> None:
    with pytest.raises(DatasetError, match="packed to length 64, but the config has length: 128"):
        PackedData(str(parent), 128, MODEL)
    with pytest.raises(DatasetError, match="tokenizer the model's, but the model folder has the tokenizer another's"):
        PackedData(str(parent), LENGTH, Fingerprint("another's", None, {}))
    with pytest.raises(UserError, match="global_batch 8 is not a multiple of 6"):
        stream(data, dp_size=3)
    less = "has 25 packs in epoch 1, less than one global_batch of"
    with pytest.raises(DatasetError, match=f"{less} 32: set global_batch to at most 24, or pack more data$"):
        stream(data, global_batch=32)
    with pytest.raises(DatasetError, match=f"{less} 32: pack more data$"):  # one for each rank is too many already
        stream(data, global_batch=32, dp_size=16)


def test_a_damaged_record_batch_is_an_error_in_the_consumer_and_never_skipped(tmp_path: Path) -> None:
    write_packed(tmp_path, random_packs(4, 8, LENGTH), LENGTH, shards=1)
    file = tmp_path / dataset_name(LENGTH, 0, 0) / shard_name(0, 1)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    data = PackedData(str(tmp_path), LENGTH, MODEL)
    with (
        stream(data) as packs,
        pytest.raises(DatasetError, match=r"shard-00000-of-00001.arrow, record batch 0 at byte"),
    ):
        next(packs.batches(0))


def test_work_ahead_is_bounded_and_saves_waiting(data: PackedData, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(packs: Sequence[Pack], form: BatchFormat) -> Batch:
        made.append(len(packs))
        return make_batch(packs, form)

    monkeypatch.setattr("trainer.data.loader.make_batch", counted)
    with stream(data, micro_batch=1) as packs:
        steps = packs.batches(0)
        next(steps)
        assert packs.wait_seconds > 0
        time.sleep(1)
        ahead = len(made) - 8
        assert 2 <= ahead <= packs._loader._ahead
        before = packs.wait_seconds
        for _ in range(3):
            time.sleep(1)  # a model at work
            next(steps)
        assert packs.wait_seconds - before < 0.5
        time.sleep(1)
        assert len(made) - 32 <= packs._loader._ahead


def test_threads_end_with_the_stream(data: PackedData) -> None:
    before = set(threading.enumerate())
    with stream(data) as packs:
        next(packs.batches(0))
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before
    abandoned = stream(data)
    steps = abandoned.batches(0)
    next(steps)
    abandoned.close()  # with work queued
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 1), (1, 4), (2, 3), (4, 2), (5, 20)])
def test_validation_sees_every_pack_once_on_equally_many_micro_batches(
    data: PackedData, dp_size: int, micro_batch: int
) -> None:
    counted, loss, batches = [], 0.0, []
    for rank in range(dp_size):
        with ValidationStream(data, FORM, micro_batch=micro_batch, dp_rank=rank, dp_size=dp_size) as held:
            mine = list(held.batches())
            assert len(mine) == held.micro_batches
            if dp_size == 1:
                for a, b in zip(mine, held.batches(), strict=True):  # again, the same
                    assert_same(a, b)
        batches.append(len(mine))
        for batch in mine:
            for ids, mask in zip(batch.input_ids.split(LENGTH), batch.loss_mask.split(LENGTH), strict=True):
                loss += float(mask.sum())
                if mask.any():
                    counted.append(tuple(ids[:24].tolist()))
    assert len(set(batches)) == 1
    assert counted == stored_keys(data.all)  # in stored order, rank after rank
    rows = stored(data.all)
    assert len(rows) == 66
    firsts = [pack.loss_mask[pack.cu_seqlens[:-1]].sum() for pack in rows]
    assert loss == sum(pack.loss_mask.sum() for pack in rows) - sum(firsts)  # a segment's first token is no label
