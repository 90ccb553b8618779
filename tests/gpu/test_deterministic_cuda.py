"""`deterministic: true` on a GPU: the same run has the same bits, also resumed, and attention is what it was."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training_job import metrics_of, train, write_job
from trainer.kernels.attention import segment_attention
from trainer.kernels.segment_flash import segment_flash

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTHS = (1, 300, 0, 700, 23, 0)  # entries of cu_seqlens repeat where a segment is empty


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups", "width"), [(12, 2, 128), (14, 2, 64), (16, 16, 80)])
def test_attention_within_segments(heads: int, groups: int, width: int, causal: bool) -> None:
    tokens = sum(LENGTHS)
    ends = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0, dtype=torch.int32)
    shapes = ((tokens, heads, width), (tokens, groups, width), (tokens, groups, width))
    exact = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    towards = torch.randn(tokens, heads, width, device="cuda")

    expected = segment_attention(exact[0], exact[1], exact[2], ends, causal=causal)
    expected.backward(towards)
    found = []
    for _ in range(3):
        out = segment_flash(rounded[0], rounded[1], rounded[2], ends, causal=causal)
        found.append((out.detach(), *torch.autograd.grad(out, rounded, towards.bfloat16())))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
    gradients = [x.grad for x in exact]
    for ours, reference in zip(found[0], [expected.detach(), *gradients], strict=True):
        assert reference is not None
        assert (ours.float() - reference).norm() < 0.01 * reference.norm()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("images", [False, True])
def test_a_run_again_and_a_run_resumed_have_the_same_bits(images: bool, tmp_path: Path) -> None:
    values = write_job(tmp_path, images=images) | {"deterministic": True, "keep_last": 2}
    first = _figures(train(values))
    again = values | {"output": str(tmp_path / "again")}
    assert _figures(train(again)) == first

    checkpoints = tmp_path / "again" / "checkpoints"
    (checkpoints / "latest").write_text("step_00000003\n")
    shutil.rmtree(checkpoints / "step_00000006")
    train(again)
    assert _figures(metrics_of(again)) == first


def _figures(metrics: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(line["step"], line["loss"], line["grad_norm"], line["validation_loss"]) for line in metrics]
