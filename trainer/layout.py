"""How a run is laid out on the devices there are. The user states facts; this decides, and says why.

python -m trainer.layout Qwen2.5-7B --gpus 8 --card H100 --length 8192
"""

import argparse
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kanyun.errors import UserError, run_cli
from trainer.data.batch import PADDING_IMAGE, BatchFormat, StaticShape
from trainer.data.images import PatchGeometry
from trainer.data.source import Packs
from trainer.model.config import ModelConfig, VisionConfig
from trainer.model.loss import CHUNK
from trainer.model.sizes import SIZES

GB = 1e9


class Card(NamedTuple):
    memory: float  # bytes, as CUDA reports it
    flops: float  # dense bfloat16 peak, FLOP/s, from NVIDIA's data sheets
    fp8: bool


CARDS = {
    "H100": Card(85.0e9, 989e12, fp8=True),
    "H200": Card(150.0e9, 989e12, fp8=True),
    "A100": Card(85.0e9, 312e12, fp8=False),
}
# From this width on fp8 pays: 1.5B trains 18 % faster than in bfloat16; 0.5B's products are too small. Losses over 300
# steps of 0.5B at equal tokens: 4.635 in bfloat16, 4.630 in fp8 (benchmarks/README.md).
FP8_HIDDEN = 1536
# Of it, what is left when CUDA, NCCL, cuBLAS and the allocator's rounding have taken theirs.
USABLE = 0.93
# Tokens that go through the model at once: more make matrix products no faster, but the step coarser.
MOST_TOKENS = 65_536


@dataclass(frozen=True)
class Layout:
    tensor_parallel: int  # processes that share one model
    micro_batch: int  # packs that go through the model at once
    reason: str  # one sentence for people
    fp8: bool = False  # matrix products of the layers in 8 bits, tensors scaled one by one
    memory: float | None = None  # predicted peak of a GPU, bytes
    recomputed_blocks: int = 0  # of the vision tower, see there


def batch_format(model: ModelConfig, static: StaticShape | None = None, pinned: bool = False) -> BatchFormat:
    """What a batch for this model looks like; see BatchFormat."""
    vision = model.vision
    geometry = PatchGeometry(vision.patch_size, vision.merge_size, vision.window_size) if vision else None
    return BatchFormat(geometry, -1 if model.image_token_id is None else model.image_token_id, static, pinned)


def static_shape(packs: Packs, micro_batch: int, geometry: PatchGeometry | None, budget: int) -> StaticShape:
    """Room for any `micro_batch` of these packs, so that one CUDA graph serves them all.

    `budget`: patches a pack may have. Padding patches take windows and images too, see make_batch.
    """
    segments = _largest(packs.column("pack_segments"), micro_batch)
    if geometry is None:
        return StaticShape(segments=segments, patches=0, windows=0, images=0)
    window = (geometry.window // geometry.patch) ** 2  # patches
    budget = -(-max(budget, 1) // window) * window
    padding = budget - packs.column("pack_patches")
    windows = _largest(packs.column("pack_windows") + -(-padding // window), micro_batch) + 1
    images = _largest(packs.column("pack_images") + -(-padding // PADDING_IMAGE), micro_batch)
    return StaticShape(segments, micro_batch * budget, windows, images)


def _largest(values: np.ndarray, count: int) -> int:
    """Sum of the `count` largest: what that many packs have at most."""
    return int(np.sort(values)[-count:].sum())


def card() -> str:
    """Which of CARDS this process's GPU is. Raises UserError if it is none of them."""
    name = torch.cuda.get_device_name()
    for known in CARDS:
        if known in name:
            return known
    raise UserError(f"the GPU is a {name!r}, and layouts are known for {', '.join(CARDS)}: use one of these")


def decide(model: ModelConfig, gpus: int, card: str | None, length: int, global_batch: int, patches: int = 0) -> Layout:
    """Layout on `gpus` processes, one device each; card: one of CARDS, None = CPUs; `patches` a pack may have.

    Raises UserError with the figure that breaks it if the model does not fit.
    """
    if card is None:
        reason = f"the whole model on each of {gpus} CPU process(es), one pack at a time: it needs the least memory"
        return Layout(tensor_parallel=1, micro_batch=1, reason=reason)
    room = CARDS[card].memory * USABLE
    for tensor_parallel in _tensor_parallels(model, gpus):
        ranks = gpus // tensor_parallel
        share = global_batch // ranks  # packs of a step that one rank has
        fitting = [
            m
            for m in (8, 4, 2, 1)
            if share % m == 0
            and (m == 1 or m * length <= MOST_TOKENS)
            and peak_memory(model, tensor_parallel, ranks, m * length, m * patches) <= room
        ]
        # One pack at a time, the fewest blocks of the vision tower again in the backward pass (1 ms each).
        recomputed = 0
        if not fitting and model.vision:
            again = [
                n
                for n in range(1, model.vision.depth + 1)
                if peak_memory(model, tensor_parallel, ranks, length, patches, n) <= room
            ]
            fitting, recomputed = ([1], again[0]) if again else ([], 0)
        if fitting:
            memory = peak_memory(model, tensor_parallel, ranks, fitting[0] * length, fitting[0] * patches, recomputed)
            split = "the whole model on each GPU" if tensor_parallel == 1 else f"each model over {tensor_parallel} GPUs"
            fp8 = CARDS[card].fp8 and model.hidden_size >= FP8_HIDDEN
            precision = "fp8 in the layers' matrix products" if fp8 else "bfloat16"
            reason = (
                f"{split}, optimizer state over {ranks} data-parallel rank(s), {fitting[0]} pack(s) of {length} at a "
                f"time in one CUDA graph, {precision}: {memory / GB:.0f} of {room / GB:.0f} usable GB a GPU predicted"
            )
            if recomputed:
                reason += f", {recomputed} blocks of the vision tower computed again in the backward pass"
            return Layout(tensor_parallel, fitting[0], reason, fp8, memory, recomputed)
    tensor_parallel = _tensor_parallels(model, gpus)[-1]
    memory = peak_memory(model, tensor_parallel, gpus // tensor_parallel, length, patches, _depth(model))
    raise UserError(
        f"{gpus} x {card} cannot train this model on packs of {length}: even over {tensor_parallel} GPU(s) a GPU needs "
        f"{memory / GB:.0f} GB and has {room / GB:.0f} usable; {_smallest(model, gpus, card, length, patches)}"
    )


def peak_memory(
    model: ModelConfig, tensor_parallel: int, ranks: int, tokens: int, patches: int = 0, recomputed: int = 0
) -> float:
    """Bytes of a GPU: weights, gradients, optimizer state, activations of `tokens` token slots and `patches`, of whose
    blocks `recomputed` run again in the backward pass, logits of a chunk.
    """
    parameters = parameter_count(model) / tensor_parallel
    # bfloat16 weights and float32 gradients; float32 master weights and two moments, sharded over the ranks
    state = parameters * (2 + 4 + 12 / ranks)
    h, q, kv, f = (
        model.hidden_size,
        model.num_heads * model.head_dim,
        model.num_kv_heads * model.head_dim,
        model.intermediate_size,
    )
    # What a layer keeps of a token for its backward pass, in bfloat16: both norms' inputs and outputs; query, key and
    # value, once more turned by rope; attention's output; gate and up, and their product.
    layer = 2 * (4 * h + (q + 2 * kv) + (q + kv) + q + 3 * f) / tensor_parallel
    activations = tokens * (model.num_layers * layer + 8 * h)
    logits = 2 * min(tokens, CHUNK) * model.vocab_size / tensor_parallel
    embedding_gradient = 2 * model.vocab_size * model.hidden_size / tensor_parallel
    vision = patches * _patch_memory(model.vision, recomputed) if model.vision else 0
    return state + activations + vision + logits + embedding_gradient


def _patch_memory(vision: VisionConfig, recomputed: int) -> float:
    """Bytes that the tower keeps of a patch for its backward pass, in bfloat16."""
    h, f = vision.hidden_size, vision.padded_intermediate_size
    # Both norms' inputs and outputs; query, key and value; attention's output; gate and up, and their product.
    block = 4 * h + 3 * h + h + 3 * f
    again = h * recomputed + (block if recomputed else 0)  # all of one block while it runs its backward pass
    merger = 4 * h  # the norm's input and output, both sides of gelu
    embedding = vision.channels * vision.patch_size**2
    return 2 * ((vision.depth - recomputed) * block + again + merger + embedding)


def _depth(model: ModelConfig) -> int:
    return model.vision.depth if model.vision else 0


def parameter_count(model: ModelConfig) -> int:
    """Of the language model and, if there is one, the vision tower."""
    h, d = model.hidden_size, model.head_dim
    qkv = (model.num_heads + 2 * model.num_kv_heads) * d
    layer = h * qkv + qkv + model.num_heads * d * h + 3 * h * model.intermediate_size + 2 * h
    embeddings = model.vocab_size * h * (1 if model.tied else 2)
    return model.num_layers * layer + embeddings + h + (_vision_parameters(model.vision) if model.vision else 0)


def _vision_parameters(vision: VisionConfig) -> int:
    h, f, unit = vision.hidden_size, vision.intermediate_size, vision.merge_size**2
    block = 4 * h * h + 4 * h + 3 * h * f + 2 * f + h + 2 * h
    embedding = h * vision.channels * vision.temporal_patch_size * vision.patch_size**2
    merger = h + (unit * h) ** 2 + unit * h + (unit * h + 1) * vision.out_hidden_size
    return embedding + vision.depth * block + merger


def _tensor_parallels(model: ModelConfig, gpus: int) -> list[int]:
    """Ways to split a model that divide it and the GPUs of a node, fewest first: each costs communication a layer."""
    divided = (model.num_heads, model.num_kv_heads, model.intermediate_size, model.vocab_size)
    return [t for t in (1, 2, 4, 8) if gpus % t == 0 and all(count % t == 0 for count in divided)]


def _smallest(model: ModelConfig, gpus: int, card: str, length: int, patches: int) -> str:
    """What would do, in words."""
    room = CARDS[card].memory * USABLE
    for more in (n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n > gpus):
        depth = _depth(model)
        if any(
            peak_memory(model, t, more // t, length, patches, depth) <= room for t in _tensor_parallels(model, more)
        ):
            return f"{more} are the fewest that can"
    return "no number of them up to 512 can: use a smaller model or shorter packs"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.layout", description="The layout that a run would get.")
    parser.add_argument("model", help=f"{', '.join(SIZES)}; or a Hugging Face folder")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--card", choices=list(CARDS), default="H100")
    parser.add_argument("--length", type=int, default=8192, help="token slots a pack (8192)")
    parser.add_argument("--patches", type=int, default=0, help="vision patches a pack has at most (0)")
    parser.add_argument("--global-batch", type=int, help="packs a step; default: 16 for each GPU")
    args = parser.parse_args()
    model = SIZES[args.model] if args.model in SIZES else ModelConfig.from_hf(args.model)
    layout = decide(model, args.gpus, args.card, args.length, args.global_batch or 16 * args.gpus, args.patches)
    memory = layout.memory or 0.0
    for name, value in {
        "model": f"{args.model}, {parameter_count(model):,} parameters",
        "tensor parallel": layout.tensor_parallel,
        "data parallel": args.gpus // layout.tensor_parallel,
        "micro-batch": f"{layout.micro_batch} pack(s) of {args.length}",
        "memory": f"{memory / GB:.1f} GB a GPU predicted, {CARDS[args.card].memory * USABLE / GB:.0f} usable",
        "why": layout.reason,
    }.items():
        print(f"{name:16} {value}")
    return 0


if __name__ == "__main__":
    run_cli(main)
