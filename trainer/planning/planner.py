"""How a run is laid out on the devices there are. The user states facts; this decides, and says why.

python -m trainer.planning.planner Qwen2.5-7B --gpus 8 --card H100 --length 8192
"""

from dataclasses import dataclass

import numpy as np
import torch

from kanyun.errors import UserError
from kanyun.vision import WINDOW
from trainer.data.batch import PADDING_IMAGE, BatchFormat, StaticShape
from trainer.data.images import PatchGeometry
from trainer.data.source import Packs
from trainer.kernels.loss import CHUNK
from trainer.models.config import BFLOAT16, Compute, ModelConfig
from trainer.models.registry import costs_of
from trainer.planning.speed import CARDS

GB = 1e9
# From this width on, 0.5B's, fp8 was seen to pay: 11 % more tokens a second, 21 % with 1.5B, 41 % with 7B. Losses after
# 300 steps of 0.5B at equal tokens: 4.479 in bfloat16, 4.460 in fp8, 4.465 by transformers; after 200 of a small image
# model 4.686, 4.724 and 4.682 (benchmarks/README.md).
FP8_HIDDEN = 896
# Of it, what is left when CUDA, NCCL, cuBLAS and the allocator's rounding have taken theirs.
USABLE = 0.93
# What the allocator takes for activations beyond their bytes: blocks are rounded, and not all of them fit again.
ROUNDED = 1.05
# Tokens that go through the model at once: more make matrix products no faster, but the step coarser.
MOST_TOKENS = 65_536
# Sizes that patches are padded to. Where pictures have many sizes, packs fill 1 to 68 %, 4 to 98.1, 16 to 99.5.
PATCH_SIZES = 16


@dataclass(frozen=True)
class Layout:
    tensor_parallel: int  # processes that share one model
    micro_batch: int  # packs that go through the model at once
    reason: str  # one sentence for people
    compute: Compute = BFLOAT16
    memory: float | None = None  # predicted peak of a GPU, bytes


def batch_format(model: ModelConfig, static: StaticShape | None = None, pinned: bool = False) -> BatchFormat:
    """What a batch for this model looks like; see BatchFormat."""
    vision = model.vision
    geometry = PatchGeometry(vision.patch_size, vision.merge_size, vision.window_size) if vision else None
    return BatchFormat(geometry, -1 if model.image_token_id is None else model.image_token_id, static, pinned)


def static_shape(packs: Packs, micro_batch: int, geometry: PatchGeometry | None) -> StaticShape:
    """Room for any `micro_batch` of these packs. Padding patches take windows and images too, see make_batch."""
    segments = _largest(packs.column("pack_segments"), micro_batch)
    if geometry is None:
        return StaticShape(segments=segments, patches=(0,), windows=0, images=0)
    side = geometry.window // geometry.patch
    window = side**2  # patches
    patches = packs.column("pack_patches")
    padding = -(-patches.max(initial=1) // window) * window - patches
    # Counted for the 8 x 8 patches of Qwen's own models: so many of a smaller window are at most in one of those.
    real = packs.column("pack_windows") * (-(-WINDOW // side)) ** 2
    windows = _largest(real + -(-padding // window), micro_batch) + 1
    images = _largest(packs.column("pack_images") + -(-padding // PADDING_IMAGE), micro_batch)
    together = np.add.reduceat(patches, np.arange(0, len(patches), micro_batch))  # of some micro-batches
    demands = np.append(together, _largest(patches, micro_batch))
    return StaticShape(segments, few_sizes(-(-np.maximum(demands, 1) // window) * window, PATCH_SIZES), windows, images)


def few_sizes(demands: np.ndarray, count: int) -> tuple[int, ...]:
    """At most `count` sizes, rising: with the least in all if each demand is given the smallest one that holds it.

    Exact, by dynamic programming over the distinct demands: the best sizes up to each, with one size more a round.
    """
    sizes, times = np.unique(demands, return_counts=True)
    up_to = np.cumsum(times)
    total, chosen = sizes * up_to, [(int(size),) for size in sizes]  # where size i is the last one
    for _ in range(count - 1):
        # [j, i]: size j as the one before i
        totals = total[:, None] + sizes * (up_to - up_to[:, None])
        totals[np.tri(len(sizes), dtype=bool)] = np.iinfo(totals.dtype).max
        before, least = totals.argmin(axis=0), totals.min(axis=0)
        chosen = [(*chosen[before[i]], int(sizes[i])) if least[i] < total[i] else chosen[i] for i in range(len(sizes))]
        total = np.minimum(total, least)
    return chosen[-1]


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
    room, fp8 = CARDS[card].memory * USABLE, _fp8(model, card)
    splits = _tensor_parallels(model, gpus)
    for tensor_parallel in splits:
        ranks = gpus // tensor_parallel
        share = global_batch // ranks  # packs of a step that one rank has
        # Up to a quarter of the layers again, a twelfth of the work, rather than split further.
        most = model.num_layers // (1 if tensor_parallel == splits[-1] else 4)
        several = [m for m in (8, 4, 2) if share % m == 0 and m * length <= MOST_TOKENS]
        # For 0.7 GB a block of the vision tower takes 1.4 ms again (18,816 patches), a layer of 3B 2 ms (8192 tokens).
        choices = [(m, Compute(fp8)) for m in (*several, 1)]
        choices += [(1, Compute(fp8, 0, blocks)) for blocks in range(1, _depth(model) + 1)]
        choices += [(1, Compute(fp8, layers, _depth(model))) for layers in range(1, most + 1)]
        for micro_batch, compute in choices:
            memory = peak_memory(model, tensor_parallel, ranks, micro_batch * length, micro_batch * patches, compute)
            if memory <= room:
                packs, needs = f"{micro_batch} pack(s) of {length}", f"{memory / GB:.0f} of {room / GB:.0f}"
                needs += " usable GB a GPU predicted"
                reason = _reason(model, tensor_parallel, ranks, packs, compute, needs)
                return Layout(tensor_parallel, micro_batch, reason, compute, memory)
    compute = Compute(fp8, model.num_layers, _depth(model))
    memory = peak_memory(model, tensor_parallel, gpus // tensor_parallel, length, patches, compute)
    raise UserError(
        f"{gpus} x {card} cannot train this model on packs of {length}: even over {tensor_parallel} GPU(s) a GPU needs "
        f"{memory / GB:.0f} GB and has {room / GB:.0f} usable; {_smallest(model, gpus, card, length, patches)}"
    )


def _reason(model: ModelConfig, tensor_parallel: int, ranks: int, packs: str, compute: Compute, memory: str) -> str:
    """The choice as one sentence."""
    facts = [
        "the whole model on each GPU" if tensor_parallel == 1 else f"each model over {tensor_parallel} GPUs",
        f"optimizer state over {ranks} data-parallel rank(s)",
        f"{packs} at a time in one CUDA graph",
        "fp8 in the layers' matrix products" if compute.fp8 else "bfloat16",
    ]
    if compute.recomputed_blocks:
        facts.append(f"{compute.recomputed_blocks} of {_depth(model)} blocks of the vision tower again in backward")
    if compute.recomputed_layers:
        facts.append(f"{compute.recomputed_layers} of {model.num_layers} layers again in backward")
    return f"{', '.join(facts)}: {memory}"


def peak_memory(
    model: ModelConfig, tensor_parallel: int, ranks: int, tokens: int, patches: int, compute: Compute
) -> float:
    """Bytes of a GPU: weights, gradients, optimizer state; activations of `tokens` slots and `patches`; logits."""
    costs, recomputed = costs_of(model), compute.recomputed_layers
    # The vision tower is whole on every rank.
    language, tower = costs.decoder_parameters / tensor_parallel, costs.vision_parameters
    # bfloat16 weights, float32 gradients; sharded over the ranks, two moments and the other half of master weights
    state = (language + tower) * (2 + 4 + 6 / ranks)
    h, layer = model.hidden_size, costs.layer_bytes(compute) / tensor_parallel
    kept = (model.num_layers - recomputed + (recomputed > 0)) * layer + recomputed * 2 * h / tensor_parallel
    activations = tokens * (kept + 8 * h)
    # In fp8 the layers' weights are cast in every forward pass, and kept in 8 bits for the backward pass.
    state += compute.fp8 * (language + tower - costs.embedding_parameters / tensor_parallel)
    # Logits, whose gradient takes their place: a chunk of them. Under tensor parallelism all, and a gradient of the
    # whole embedding.
    rows = min(tokens, CHUNK) if tensor_parallel == 1 else tokens + h
    logits = 2 * rows * model.vocab_size / tensor_parallel
    return state + ROUNDED * (activations + patches * costs.patch_bytes(compute)) + logits


def _fp8(model: ModelConfig, card: str) -> bool:
    return CARDS[card].fp8 and model.hidden_size >= FP8_HIDDEN


def _depth(model: ModelConfig) -> int:
    return model.vision.depth if model.vision else 0


def _tensor_parallels(model: ModelConfig, gpus: int) -> list[int]:
    """Ways to split a model that divide it and the GPUs of a node, fewest first: each costs communication a layer."""
    divided = (model.num_heads, model.num_kv_heads, model.intermediate_size, model.vocab_size)
    return [t for t in (1, 2, 4, 8) if gpus % t == 0 and all(count % t == 0 for count in divided)]


def _smallest(model: ModelConfig, gpus: int, card: str, length: int, patches: int) -> str:
    """What would do, in words."""
    room, compute = CARDS[card].memory * USABLE, Compute(_fp8(model, card), model.num_layers, _depth(model))
    for more in (n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n > gpus):
        splits = _tensor_parallels(model, more)
        if any(peak_memory(model, t, more // t, length, patches, compute) <= room for t in splits):
            return f"{more} are the fewest that can"
    return "no number of them up to 512 can: use a smaller model or shorter packs"
