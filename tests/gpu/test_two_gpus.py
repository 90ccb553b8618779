"""Two GPUs train as one does."""

from pathlib import Path

import pytest
import torch

from tests.support.two_processes import assert_overlap_changes_nothing, assert_two_train_as_one

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


def test_two_data_parallel_ranks(tmp_path: Path) -> None:
    assert_two_train_as_one(tmp_path, tolerance=0.01)


@pytest.mark.parametrize("exchange", ["within a node", "between nodes"])
def test_two_ranks_that_share_the_weights(exchange: str, tmp_path: Path) -> None:
    """Within a node copy engines gather them, between nodes NCCL does."""
    assert_two_train_as_one(tmp_path, weight_shards=2, tolerance=0.01, exchange=exchange)


def test_two_halves_of_a_model(tmp_path: Path) -> None:
    assert_two_train_as_one(tmp_path, tensor_parallel=2, tolerance=0.01)


@pytest.mark.parametrize("weight_shards", [1, 2])
def test_an_exchange_beside_compute_changes_nothing(weight_shards: int, tmp_path: Path) -> None:
    assert_overlap_changes_nothing(tmp_path, weight_shards=weight_shards)
