"""Master weights as bfloat16 weights and remainders; a range of a matrix as rectangles."""

import torch

from trainer.optim.remainders import joined, split
from trainer.optim.state import cut


def test_every_bit_of_a_master_weight_is_kept() -> None:
    draw = torch.Generator().manual_seed(0)
    some = torch.randn(10_000, generator=draw) * torch.logspace(-30, 30, 10_000)
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-45, -3.4e38, 3.4e38, float("inf")])
    for master in (some, edges):
        weight, remainder = split(master)
        assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
        assert torch.equal(joined(weight, remainder).view(torch.int32), master.view(torch.int32))


def test_the_weight_is_the_nearest() -> None:
    """What FusedAdam starts from when it has the bfloat16 weight alone, and what the model computes with."""
    master = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    weight, _ = split(master)
    rounded = master.bfloat16()
    assert torch.equal((weight.float() - master).abs(), (rounded.float() - master).abs())
    exact = rounded.float()
    assert torch.equal(split(exact)[0], rounded)
    assert not split(exact)[1].any()


def test_rectangles_cover_a_range_and_nothing_else() -> None:
    for rows, width in ((5, 7), (5, 1), (1, 7)):
        for first in range(rows * width + 1):
            for last in range(rows * width + 1):
                covered = torch.zeros(rows, width, dtype=torch.int)
                found = list(cut(first, last, width))
                for row, column, high, wide in found:
                    covered[row : row + high, column : column + wide] += 1
                assert covered.flatten().tolist() == [int(first <= i < last) for i in range(rows * width)]
                assert len(found) <= 3
