"""Decides how a run is laid out on its devices: sharding, micro-batch, precision, recomputation.

The user states what to train on what; there is nothing to tune. Of the layouts that fit, the one with the least
predicted step time is taken. Imports neither torch nor megatron.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kanyun.errors import UserError
from trainer.models.config import BFLOAT16, Compute, ModelConfig
from trainer.models.registry import costs_of
from trainer.planning.gpus import GPU, NODE
from trainer.planning.memory import MemoryModel
from trainer.planning.speed import SpeedModel, StepTime

GB = 1e9
# From this width on, 0.5B's, fp8 was seen to pay: 11 % more tokens a second, 21 % with 1.5B, 41 % with 7B. Loss of
# held-out packs after 1,000 steps of 0.5B, fp8 - bfloat16 of the same seed: +0.008 +- 0.017 (benchmarks/README.md).
FP8_HIDDEN = 896
# Token slots of a micro-batch: more make matrix products no faster, but the step coarser.
MOST_TOKENS = 65_536
MICRO_BATCHES = (8, 4, 2, 1)
TENSOR_PARALLEL = (1, 2, 4, 8)  # within a node
MOST_GPUS = 512
# Recomputation and offloading with several packs a micro-batch have not been measured: they are taken where they are
# predicted to be faster by more than this, a third of what predictions are off by.
MARGIN = 1.02


@dataclass(frozen=True)
class Layout:
    tensor_parallel: int  # ranks of one tensor-parallel group
    micro_batch: int  # packs
    reason: str  # one sentence for people
    compute: Compute = BFLOAT16
    memory: float | None = None  # predicted peak of a GPU, bytes
    # 1: every rank has whole weights. N: weights, gradients and optimizer state are sharded over N neighbouring ranks.
    weight_shards: int = 1
    step: StepTime | None = None  # predicted


class LayoutPlanner:
    """Plans one model on `gpus` processes with one device each. `gpu`: None for CPUs. `node`: devices of a node.

    `host_memory`: bytes for each device that activations may be offloaded to.
    """

    def __init__(
        self, model: ModelConfig, gpu: GPU | None, gpus: int, node: int = NODE, host_memory: float = math.inf
    ) -> None:
        self._model, self._gpu, self._gpus, self._node, self._host = model, gpu, gpus, node, host_memory
        self._memory = MemoryModel(model)

    def plan(self, *, length: int, global_batch: int, patches: int = 0) -> Layout:
        """Return the layout for packs of `length` slots and at most `patches`, `global_batch` of them a step.

        Raises UserError with the figure that breaks it if the model does not fit.
        """
        if self._gpu is None:
            reason = f"the whole model on each of {self._gpus} CPU process(es), one pack at a time for the least memory"
            return Layout(tensor_parallel=1, micro_batch=1, reason=reason)
        ranked = self.ranked(length=length, global_batch=global_batch, patches=patches)
        return ranked[0]

    def ranked(self, *, length: int, global_batch: int, patches: int = 0) -> list[Layout]:
        """Return the layouts that fit, the fastest first.

        Raises UserError if there is none.
        """
        assert self._gpu is not None
        layouts = [
            layout
            for tensor_parallel, weight_shards in self._splits(self._gpus)
            for micro_batch in MICRO_BATCHES
            if (layout := self._fit(tensor_parallel, weight_shards, micro_batch, length, global_batch, patches))
        ]
        if not layouts:
            raise UserError(self._does_not_fit(self._gpu, length, patches))
        if any(1 < layout.weight_shards <= self._node for layout in layouts):
            # Between nodes NCCL gathers, over networks that were not measured: only for what does not fit a node.
            layouts = [layout for layout in layouts if layout.weight_shards <= self._node]
        # Where whole weights leave room for everything, the same micro-batch has been slower with sharded ones: on two
        # H200s 1.5B by 1.3 %, 3B by 2.2 %, at -0.2 and +0.5 % predicted.
        whole = [each for each in layouts if each.weight_shards == each.tensor_parallel == 1]
        roomy = {each.micro_batch for each in whole if not _saves_memory(each.compute)}
        layouts = [each for each in layouts if each.weight_shards == 1 or each.micro_batch not in roomy]
        return sorted(layouts, key=_order)

    def _splits(self, gpus: int) -> Iterator[tuple[int, int]]:
        """Yield tensor-parallel sizes with whole weights, then the numbers of ranks that weights are sharded over."""
        model = self._model
        divided = (gpus, self._node, model.num_heads, model.num_kv_heads, model.intermediate_size, model.vocab_size)
        yield from ((size, 1) for size in TENSOR_PARALLEL if all(count % size == 0 for count in divided))
        # All ranks of a node, which NVLink connects; of whole nodes, where one node has too little memory.
        shards = min(self._node, gpus)
        while 1 < shards <= gpus:
            if gpus % shards == 0:
                yield 1, shards
            shards *= 2

    def _fit(
        self, tensor_parallel: int, weight_shards: int, micro_batch: int, length: int, global_batch: int, patches: int
    ) -> Layout | None:
        """Return the layout with the least recomputation that fits, if any."""
        assert self._gpu is not None
        # Packs of a step that one model replica has. Where they do not divide, the data stream says so.
        share = max(global_batch * tensor_parallel // self._gpus, 1)
        if share % micro_batch or (micro_batch > 1 and micro_batch * length > MOST_TOKENS):
            return None
        swiglu = costs_of(self._model).swiglu_bytes * micro_batch * length / tensor_parallel
        most_offloaded = int(min(self._host / swiglu, self._model.num_layers))
        for compute in self._computes(self._gpu, most_offloaded, whole=tensor_parallel == weight_shards == 1):
            memory = self._peak(tensor_parallel, weight_shards, micro_batch * length, micro_batch * patches, compute)
            if memory <= self._gpu.usable:
                break
        else:
            return None
        step = SpeedModel(self._model, self._gpu, self._node).step(
            gpus=self._gpus,
            tensor_parallel=tensor_parallel,
            tokens=share * length,
            patches=share * patches,
            compute=compute,
            micro_batches=share // micro_batch,
            weight_shards=weight_shards,
        )
        layout = Layout(tensor_parallel, micro_batch, "", compute, memory, weight_shards, step)
        return replace(layout, reason=self._reason(self._gpu, layout, length, memory))

    def _computes(self, gpu: GPU, most_offloaded: int, *, whole: bool) -> Iterator[Compute]:
        """Yield ways to compute, from the fastest to the one of least memory; `whole`: weights are on each GPU."""
        fp8, depth, layers = self._fp8(gpu), self._vision_depth, self._model.num_layers
        speed = SpeedModel(self._model, gpu, self._node)

        def offloaded(compute: Compute) -> int:
            return min(speed.offloadable(compute), most_offloaded)

        if fp8 and whole:  # saves 0.7 % of a step, for a byte a parameter
            yield Compute(fp8, transposed_weights=True)
        # What saving a GB costs in a micro-batch: offloading 0.7 ms, a recomputed vision block 2 (18,816 patches), a
        # recomputed layer of 3B 3 (8192 tokens).
        plain = Compute(fp8)
        yield from (replace(plain, offloaded_layers=count) for count in range(offloaded(plain) + 1))
        for blocks in range(1, depth + 1):
            yield replace(plain, recomputed_blocks=blocks, offloaded_layers=offloaded(plain))
        for recomputed in range(1, layers + 1):
            compute = replace(plain, recomputed_layers=recomputed, recomputed_blocks=depth)
            yield replace(compute, offloaded_layers=offloaded(compute))

    def _peak(
        self, tensor_parallel: int, weight_shards: int, tokens: int, patches: int, compute: Compute, gpus: int = 0
    ) -> float:
        return self._memory.peak(
            tensor_parallel=tensor_parallel,
            data_parallel=(gpus or self._gpus) // tensor_parallel,
            tokens=tokens,
            patches=patches,
            compute=compute,
            weight_shards=weight_shards,
            node=self._node,
        )

    def _reason(self, gpu: GPU, layout: Layout, length: int, memory: float) -> str:
        """Return the choice as one sentence."""
        compute, ranks = layout.compute, self._gpus // layout.tensor_parallel
        parts = [
            f"{layout.micro_batch} pack(s) of {length} a micro-batch in one CUDA graph",
            "fp8 in the layers' matrix products" if compute.fp8 else "bfloat16",
        ]
        if layout.weight_shards > 1:
            parts.insert(0, f"weights, gradients and optimizer state sharded over {layout.weight_shards} GPUs")
        else:
            split = layout.tensor_parallel
            whole = "the whole model on each GPU" if split == 1 else f"tensor parallel over {split} GPUs"
            parts[:0] = [whole, f"optimizer state over {ranks} data-parallel rank(s)"]
        if compute.offloaded_layers:
            parts.append(f"SwiGLU's inputs of {compute.offloaded_layers} layers offloaded to the host")
        if compute.recomputed_blocks:
            parts.append(f"recompute {compute.recomputed_blocks} of {self._vision_depth} vision blocks")
        if compute.recomputed_layers:
            parts.append(f"recompute {compute.recomputed_layers} of {self._model.num_layers} layers")
        return f"{', '.join(parts)}: {memory / GB:.0f} of {gpu.usable / GB:.0f} usable GB a GPU predicted"

    def _does_not_fit(self, gpu: GPU, length: int, patches: int) -> str:
        """Return the error: what the least memory would be, and the fewest GPUs that have it."""
        least, how = self._least_memory(gpu, self._gpus, length, patches)
        missing = (least - gpu.usable) / GB
        way_out = f"no number of them up to {MOST_GPUS} can: use a smaller model or shorter packs"
        for gpus in (n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, MOST_GPUS) if n > self._gpus):
            if self._least_memory(gpu, gpus, length, patches)[0] <= gpu.usable:
                way_out = f"{gpus} are the fewest that can"
                break
        return (
            f"{self._gpus} x {gpu.name} cannot train this model on packs of {length}: even with {how} and everything "
            f"recomputed a GPU needs {least / GB:.0f} GB and has {gpu.usable / GB:.0f} usable, {missing:.0f} GB are "
            f"missing; {way_out}"
        )

    def _least_memory(self, gpu: GPU, gpus: int, length: int, patches: int) -> tuple[float, str]:
        """Return the least peak, with one pack a micro-batch and everything recomputed, and how it is reached."""
        compute = Compute(self._fp8(gpu), self._model.num_layers, self._vision_depth)
        peaks = ((self._peak(*split, length, patches, compute, gpus), split) for split in self._splits(gpus))
        memory, (tensor_parallel, shards) = min(peaks)
        if shards > 1:
            return memory, f"weights, gradients and optimizer state sharded over {shards} GPUs"
        return memory, f"tensor parallelism over {tensor_parallel} GPUs" if tensor_parallel > 1 else "whole weights"

    def _fp8(self, gpu: GPU) -> bool:
        return gpu.fp8 and self._model.hidden_size >= FP8_HIDDEN

    @property
    def _vision_depth(self) -> int:
        return self._model.vision.depth if self._model.vision else 0


def _order(layout: Layout) -> tuple[float, int, int]:
    """Return what layouts are sorted by: predicted seconds, then the least exchange and the fewest micro-batches."""
    assert layout.step is not None
    margin = MARGIN if _saves_memory(layout.compute) and layout.micro_batch > 1 else 1.0
    return margin * layout.step.seconds, layout.weight_shards, -layout.micro_batch


def _saves_memory(compute: Compute) -> bool:
    return compute.recomputed_layers + compute.recomputed_blocks + compute.offloaded_layers > 0
