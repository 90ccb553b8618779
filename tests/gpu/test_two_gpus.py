"""Two GPUs train as one does."""

from pathlib import Path

import pytest
import torch

from tests.support.two_processes import assert_overlap_changes_nothing, assert_two_train_as_one

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


def test_two_data_parallel_ranks(tmp_path: Path) -> None:
    assert_two_train_as_one(tmp_path, tensor_parallel=1, tolerance=0.01)


def test_two_halves_of_a_model(tmp_path: Path) -> None:
    assert_two_train_as_one(tmp_path, tensor_parallel=2, tolerance=0.01)


def test_an_exchange_beside_compute_changes_nothing(tmp_path: Path) -> None:
    assert_overlap_changes_nothing(tmp_path)
