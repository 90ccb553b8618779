"""Where a training step's time goes on a GPU, kind by kind of kernel, beside the least it could be."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from trainer.data.batch import Batch
from trainer.models.config import Compute, ModelConfig
from trainer.models.costs import TRAINING
from trainer.models.qwen2_5.config import WindowedVisionConfig
from trainer.models.registry import costs_of
from trainer.planning.gpus import GPUS
from trainer.planning.speed import PRODUCTS_FP8, UPDATE, SpeedModel
from trainer.trainer import Run

# The first that a kernel's name matches.
KINDS = {
    "optimizer": "multi_tensor|adam|l2norm",
    "attention": "sdpa|flash|fmha|attention|attn|window|cudnn_generated",
    "matrix products": "gemm|nvjet|cutlass|xmma|cublas|splitk",
    "cross entropy": "cross_entropy",
    "SwiGLU, GELU": "gated|swiglu|glu|gelu",
    "casts to fp8 and their maxima": "amax|cast|quantize|fp8|transpose_optimized",
    "copies, fills": "memcpy|memset|copy|fill|catarray",
    "norms, rope, residuals, biases": "norm|rope|elementwise|triton|reduce",
}
# Of an H100 as measured: matrix products alone in bfloat16, FlashAttention on long segments, a copy.
PRODUCTS, ATTENTION, BANDWIDTH = 800e12, 500e12, 3.0e12


def print_profile(run: Run, step: Callable[[], object], batches: Sequence[Batch]) -> None:
    """`step` trains on `batches`. Prints a table, and under it the slowest kernels of each kind."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
    kinds: dict[str, Counter[str]] = {name: Counter() for name in (*KINDS, "others")}
    for event in recorded.key_averages():
        kind = next((kind for kind, words in KINDS.items() if re.search(words, event.key, re.IGNORECASE)), "others")
        kinds[kind][event.key] += event.self_device_time_total / 1e3
    floors, total = least(run.model, Compute(run.layout.compute.fp8), batches), start.elapsed_time(end)
    lines = [f"| ms of a step of {total:,.0f} | taken | least |", "|---|--:|--:|"]
    for kind, names in kinds.items():
        lines.append(f"| {kind} | {names.total():,.0f} | {1e3 * floors.get(kind, 0):,.0f} |")
    idle = total - sum(names.total() for names in kinds.values())
    lines.append(f"| no kernel at work | {idle:,.0f} | 0 |")
    for kind, names in kinds.items():
        lines += [f"{kind}: {spent:,.1f} ms {name[:100]}" for name, spent in names.most_common(5)]
    print("\n".join(lines))


def least(model: ModelConfig, compute: Compute, batches: Sequence[Batch]) -> dict[str, float]:
    """Seconds by kind, of a step on these batches where nothing is computed twice."""
    slots = sum(len(batch.input_ids) for batch in batches)
    forward = sum(costs_of(model).forward_flops(batch) for batch in batches)
    token = SpeedModel(model, GPUS["H100"]).work(compute)
    layer_flops, patch_bytes = slots * costs_of(model).token_flops, Counter[str]()
    if model.vision is not None:
        vision = model.vision
        patches = sum(batch.real_patches for batch in batches)
        layer_flops += patches * costs_of(model).patch_flops
        # As of the language model's layers, see SpeedModel.work. GELU reads and writes 5 values, SwiGLU 8.
        gated = isinstance(vision, WindowedVisionConfig)
        patch_bytes["activations"] = patches * vision.depth * 2 * (8 if gated else 5) * vision.intermediate_size
        patch_bytes["norms"] = patches * vision.depth * 2 * 24 * vision.hidden_size
        casts = 5 * (8 * vision.hidden_size + (2 + gated) * vision.intermediate_size) * compute.fp8
        patch_bytes["casts"] = patches * vision.depth * casts
    head, in_layers = slots * token.head, TRAINING * layer_flops - slots * token.head
    return {
        "optimizer": UPDATE * costs_of(model).parameters / BANDWIDTH,
        "attention": 3.5 * (forward - layer_flops) / ATTENTION,
        "matrix products": in_layers / (PRODUCTS_FP8 if compute.fp8 else PRODUCTS) + head / PRODUCTS,
        "cross entropy": slots * token.loss / BANDWIDTH,
        "SwiGLU, GELU": (slots * token.swiglu + patch_bytes["activations"]) / BANDWIDTH,
        "casts to fp8 and their maxima": (slots * token.casts + patch_bytes["casts"]) / BANDWIDTH,
        "norms, rope, residuals, biases": (slots * token.norms + patch_bytes["norms"]) / BANDWIDTH,
    }
