"""The look-up that a GPU uses adds the gradient of torch's embedding to main_grad."""

import pytest
import torch

from trainer.kernels.embedding import LookUp


@pytest.mark.parametrize("ids", [[3, 0, 3, 9, 3, 0, 7], [5], [2, 2, 2], [9, 0]])
def test_gradient_is_added_to_main_grad(ids: list[int]) -> None:
    weight, tokens = torch.randn(10, 4).requires_grad_(), torch.tensor(ids)
    before = torch.randn(10, 4)
    weight.main_grad = before  # type: ignore[attr-defined]
    expected, slope = before.clone(), torch.randn(len(ids), 4)
    for n, token in enumerate(ids):
        expected[token] += slope[n]
    found = LookUp.apply(tokens, weight)
    assert torch.equal(found, weight[tokens])
    found.backward(slope)
    assert weight.grad is None
    torch.testing.assert_close(before, expected)  # which main_grad still is
