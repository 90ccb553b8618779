"""The order of training is a permutation, pure, and the same for any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kanyun.order import WINDOW, Order, shuffled


def walk(order: Order, global_batch: int) -> list[tuple[int, int]]:
    return [order.locate(i) for i in range(order.steps * global_batch)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 7), st.integers(0, 2**31), st.booleans())
def test_every_pack_at_most_once_and_few_left_over(sizes: list[int], global_batch: int, seed: int, cost: bool) -> None:
    costs = np.random.default_rng(seed).integers(1, 100, sum(sizes)) if cost else None
    order = Order(np.array(sizes), global_batch, "digest", seed, 0, costs)
    places = walk(order, global_batch)
    assert len(set(places)) == len(places) == sum(sizes) // global_batch * global_batch
    assert all(0 <= row < sizes[batch] for batch, row in places)
    assert places == walk(Order(np.array(sizes), global_batch, "digest", seed, 0, costs), global_batch)


def test_epochs_seeds_and_digests_differ() -> None:
    sizes = np.full(50, 4)
    orders = [Order(sizes, 8, digest, seed, epoch) for digest in "ab" for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(walk(order, 8)) for order in orders}) == 8


def test_a_record_batch_is_read_once_by_one_slot() -> None:
    sizes, global_batch = np.full(64, 4), 8  # runs of 32 packs: 8 whole record batches each
    order = Order(sizes, global_batch, "d", 0, 0, np.arange(256))
    slots: dict[int, set[int]] = {}
    for i, (batch, _) in enumerate(walk(order, global_batch)):
        slots.setdefault(batch, set()).add(i % global_batch)
    assert all(len(s) == 1 for s in slots.values())


def test_packs_of_a_step_cost_about_the_same() -> None:
    costs = np.random.default_rng(0).lognormal(size=WINDOW * 100 * 8)
    sizes = np.full(WINDOW * 100, 8)

    def imbalance(order: Order) -> float:
        cost = np.array([costs[8 * batch + row] for batch, row in walk(order, 8)]).reshape(-1, 8)
        return float((cost.max(1) / cost.mean(1)).mean())

    plain, even = imbalance(Order(sizes, 8, "d", 0, 0)), imbalance(Order(sizes, 8, "d", 0, 0, costs))
    assert plain > 2
    assert even < 1 + (plain - 1) / 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 7), st.integers(0, 2**31))
def test_costs_are_those_of_the_packs_of_a_step(sizes: list[int], global_batch: int, seed: int) -> None:
    costs = np.random.default_rng(seed).integers(1, 100, sum(sizes))
    order, first = Order(np.array(sizes), global_batch, "digest", seed, 0, costs), np.cumsum([0, *sizes])
    expected = [int(costs[first[batch] + row]) for batch, row in walk(order, global_batch)]
    assert [int(cost) for step in range(order.steps) for cost in order.costs(step)] == expected


def test_shuffle_never_changes() -> None:
    """A value written down: resuming must find the same order after any library was upgraded."""
    assert shuffled(8, 42).tolist() == [1, 2, 0, 5, 6, 7, 3, 4]
    assert sorted(shuffled(1000, 7)) == list(range(1000))


def test_index_past_the_epoch_is_refused() -> None:
    with pytest.raises(IndexError):
        Order(np.array([3]), 2, "d", 0, 0).locate(2)
