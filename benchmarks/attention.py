"""Attention kernels by segment lengths: cuDNN through Transformer Engine, FlashAttention 2 as torch ships it, ours.

usage: python benchmarks/attention.py
Text: forward and backward of one layer on packs of 8192 cut into 6, 64 and 400 segments (lengths are an exponential
draw), eight packs at once, in a CUDA graph. `bound`: the longest segment that the kernel is told of, which sets its
grid: the whole micro-batch, a pack, or the truth. FLOPs are causal and per segment. Vision tower: one block of 18,816
patches and 16 heads of 80 channels, in windows and in whole images, from the projection's output, rope included.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention

from benchmarks.train_text import flash_attention
from kanyun.cli.parser import Parser
from trainer.kernels.rope import rotary_2d
from trainer.models.qwen2_5.sizes import SIZES
from trainer.models.qwen2_5.vision_layers_te import TEVisionLayers, rotated

LENGTH, PACKS, REPEATS = 8192, 8, 10
SHAPES = {"0.5B": (14, 2, 64), "1.5B": (12, 2, 128)}  # heads, groups, dimension
PATCHES = 18_816


@dataclass(frozen=True)
class Layer:
    """Inputs of a layer's attention, and the two kernels on them."""

    query: Tensor  # [T, heads, D]
    key: Tensor  # [T, groups, D]
    value: Tensor
    ends: Tensor  # cumulative lengths
    module: DotProductAttention

    @classmethod
    def make(cls, heads: int, groups: int, width: int, ends: np.ndarray) -> "Layer":
        module = DotProductAttention(heads, width, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="thd")
        query, key, value = (
            torch.randn(PACKS * LENGTH, count, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for count in (heads, groups, groups)
        )
        return cls(query, key, value, torch.tensor(ends, device="cuda"), module)

    def cudnn(self, bound: int) -> Tensor:
        ends = {"cu_seqlens_q": self.ends, "cu_seqlens_kv": self.ends}
        bounds = {"max_seqlen_q": bound, "max_seqlen_kv": bound}
        out: Tensor = self.module(self.query, self.key, self.value, **ends, **bounds, attn_mask_type="padding_causal")
        return out

    def flash(self, bound: int) -> Tensor:
        return flash_attention(self.query, self.key, self.value, self.ends, bound, causal=True).flatten(1)

    def both_passes(self, kernel: Callable[[int], Tensor], bound: int) -> None:
        out = kernel(bound)
        torch.autograd.grad(out, (self.query, self.key, self.value), torch.ones_like(out))


def cuts(segments: int) -> np.ndarray:
    """Cumulative lengths of all packs."""
    draw = np.random.default_rng(segments)
    ends = [0]
    for pack in range(PACKS):
        shares = draw.exponential(size=segments).cumsum()
        inner = np.unique((shares[:-1] / shares[-1] * LENGTH).astype(int))
        ends += [pack * LENGTH + int(end) for end in inner if end > 0] + [(pack + 1) * LENGTH]
    return np.array(ends, np.int32)


def seconds(work: Callable[[], object]) -> float:
    """Of one replay of `work` as a CUDA graph."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(REPEATS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / REPEATS / 1e3


def report(name: str, segments: int) -> None:
    heads, groups, width = SHAPES[name]
    ends = cuts(segments)
    lengths = np.diff(ends).astype(float)
    flops = 3.5 * 4 * heads * width * (lengths * (lengths + 1) / 2).sum()  # backward: 5 products, forward 2
    layer = Layer.make(heads, groups, width, ends)
    for what, kernel in (("cuDNN", layer.cudnn), ("FlashAttention 2", layer.flash)):
        for bound in (PACKS * LENGTH, LENGTH, int(lengths.max())):
            with torch.no_grad():
                forward = seconds(lambda kernel=kernel, bound=bound: kernel(bound))  # type: ignore[misc]
            took = seconds(lambda kernel=kernel, bound=bound: layer.both_passes(kernel, bound))  # type: ignore[misc]
            print(
                f"{name} {segments:4} segments, {what:16} bound {bound:6}: forward {forward * 1e3:6.2f} ms, "
                f"with backward {took * 1e3:6.2f} ms, {flops / took / 1e12:4.0f} TFLOP/s",
                flush=True,
            )


def report_tower(segments: str, lengths: list[int], bound: int) -> None:
    """`bound`: what kernels are told of the longest segment."""
    vision = SIZES["Qwen2.5-VL-3B"].vision
    assert vision is not None
    shape = PATCHES, 3, vision.num_heads, vision.head_dim
    qkv = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rotary = rotary_2d(torch.randint(0, 56, (PATCHES, 2), device="cuda"), vision.head_dim)
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    config = TransformerConfig(num_layers=1, hidden_size=vision.hidden_size, num_attention_heads=vision.num_heads)
    layers = TEVisionLayers(vision, config, qkv.device)
    gradient, ours = torch.randn_like(qkv[:, 0]), layers.attend
    kernels: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ours(qkv, rotary, ends, bound),
        "rope, FlashAttention 2": lambda: flash_attention(*rotated(qkv, rotary), ends, bound, causal=False),
    }
    for what, kernel in kernels.items():
        with torch.no_grad():
            forward = seconds(kernel)
        took = seconds(lambda kernel=kernel: torch.autograd.grad(kernel().view_as(gradient), qkv, gradient))  # type: ignore[misc]
        print(f"{segments}, {what:24} forward {forward * 1e3:6.2f} ms, with backward {took * 1e3:6.2f} ms", flush=True)


def main() -> None:
    torch.cuda.set_stream(torch.cuda.Stream())
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    report_tower("windows of 64", [64] * (PATCHES // 64), 64)
    for images in ([784] * 24, [3136] * 6, [12_544, 3136, 3136]):
        report_tower(f"{len(images)} images", images, PATCHES)
    for name in SHAPES:
        for segments in (6, 64, 400):
            report(name, segments)


if __name__ == "__main__":
    Parser(description=__doc__, example="python benchmarks/attention.py").parse_args()
    main()
