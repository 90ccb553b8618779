"""Attention kernels by segment lengths: cuDNN through Transformer Engine, FlashAttention 2 as torch ships it.

usage: python benchmarks/attention.py
Forward and backward of one layer on packs of 8192 cut into 6, 64 and 400 segments (lengths are an exponential draw),
eight packs at once, in a CUDA graph. `bound`: the longest segment that the kernel is told of, which sets its grid: the
whole micro-batch, or a pack. FLOPs are causal and per segment.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformer_engine.pytorch import DotProductAttention

LENGTH, PACKS, REPEATS = 8192, 8, 10
SHAPES = {"0.5B": (14, 2, 64), "1.5B": (12, 2, 128)}  # heads, groups, dimension


def cuts(segments: int) -> np.ndarray:
    """Cumulative lengths of all packs."""
    draw = np.random.default_rng(segments)
    ends = [0]
    for pack in range(PACKS):
        shares = draw.exponential(size=segments).cumsum()
        inner = np.unique((shares[:-1] / shares[-1] * LENGTH).astype(int))
        ends += [pack * LENGTH + int(end) for end in inner if end > 0] + [(pack + 1) * LENGTH]
    return np.array(ends, np.int32)


def seconds(work: Callable[[], None]) -> float:
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


def main() -> None:
    torch.cuda.set_stream(torch.cuda.Stream())
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name, (heads, groups, width) in SHAPES.items():
        cudnn = DotProductAttention(heads, width, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="thd")
        for segments in (6, 64, 400):
            ends = cuts(segments)
            lengths = np.diff(ends).astype(float)
            flops = 3.5 * 4 * heads * width * (lengths * (lengths + 1) / 2).sum()  # backward: 5 products, forward 2
            cu_seqlens = torch.tensor(ends, device="cuda")
            shape = (PACKS * LENGTH, heads, width), (PACKS * LENGTH, groups, width), (PACKS * LENGTH, groups, width)
            q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shape)
            gradient = torch.randn(PACKS * LENGTH, heads * width, device="cuda", dtype=torch.bfloat16)

            def by_cudnn(bound: int) -> Tensor:
                return cudnn(
                    q,
                    k,
                    v,
                    cu_seqlens_q=cu_seqlens,
                    cu_seqlens_kv=cu_seqlens,
                    max_seqlen_q=bound,
                    max_seqlen_kv=bound,
                    attn_mask_type="padding_causal",
                )

            def by_flash(bound: int) -> Tensor:
                repeated = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
                return varlen_attn(q, *repeated, cu_seqlens, cu_seqlens, bound, bound, window_size=(-1, 0)).flatten(1)

            for kernel, attention in (("cuDNN", by_cudnn), ("FlashAttention 2", by_flash)):
                for bound in (PACKS * LENGTH, LENGTH, int(lengths.max())):

                    def both() -> None:
                        torch.autograd.grad(attention(bound), (q, k, v), gradient)

                    with torch.no_grad():
                        forward = seconds(lambda: attention(bound))
                    took = seconds(both)
                    print(
                        f"{name} {segments:4} segments, {kernel:16} bound {bound:6}: forward {forward * 1e3:6.2f} ms, "
                        f"with backward {took * 1e3:6.2f} ms, {flops / took / 1e12:4.0f} TFLOP/s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
