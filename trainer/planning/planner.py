"""Decides how a run is laid out on its devices: tensor parallelism, micro-batch, precision, recomputation.

The user states what to train on what; there is nothing to tune. Imports neither torch nor megatron.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kanyun.errors import UserError
from trainer.models.config import BFLOAT16, Compute, ModelConfig
from trainer.planning.gpus import GPU
from trainer.planning.memory import MemoryModel

GB = 1e9
# From this width on, 0.5B's, fp8 was seen to pay: 11 % more tokens a second, 21 % with 1.5B, 41 % with 7B. Losses after
# 300 steps of 0.5B at equal tokens: 4.479 in bfloat16, 4.460 in fp8, 4.465 by transformers; after 200 of a small image
# model 4.686, 4.724 and 4.682 (benchmarks/README.md).
FP8_HIDDEN = 896
# Token slots of a micro-batch: more make matrix products no faster, but the step coarser.
MOST_TOKENS = 65_536
TENSOR_PARALLEL = (1, 2, 4, 8)  # within a node
MOST_GPUS = 512


@dataclass(frozen=True)
class Layout:
    tensor_parallel: int  # ranks of one tensor-parallel group
    micro_batch: int  # packs
    reason: str  # one sentence for people
    compute: Compute = BFLOAT16
    memory: float | None = None  # predicted peak of a GPU, bytes
    weight_shards: int = 1  # ranks that the decoder layers' weights, gradients and optimizer state are sharded over


class LayoutPlanner:
    """Plans one model on `gpus` processes with one device each. `gpu`: None for CPUs."""

    def __init__(self, model: ModelConfig, gpu: GPU | None, gpus: int) -> None:
        self._model, self._gpu, self._gpus = model, gpu, gpus
        self._memory = MemoryModel(model)

    def plan(self, *, length: int, global_batch: int, patches: int = 0) -> Layout:
        """Return the layout for packs of `length` slots and at most `patches`, `global_batch` of them a step.

        Raises UserError with the figure that breaks it if the model does not fit.
        """
        if self._gpu is None:
            reason = f"the whole model on each of {self._gpus} CPU process(es), one pack at a time for the least memory"
            return Layout(tensor_parallel=1, micro_batch=1, reason=reason)
        for tensor_parallel in self._tensor_parallel_sizes(self._gpus):
            for micro_batch, compute in self._choices(self._gpu, tensor_parallel, length, global_batch):
                memory = self._memory.peak(
                    tensor_parallel=tensor_parallel,
                    data_parallel=self._gpus // tensor_parallel,
                    tokens=micro_batch * length,
                    patches=micro_batch * patches,
                    compute=compute,
                )
                if memory <= self._gpu.usable:
                    packs = f"{micro_batch} pack(s) of {length} a micro-batch"
                    reason = self._reason(self._gpu, tensor_parallel, packs, compute, memory)
                    return Layout(tensor_parallel, micro_batch, reason, compute, memory)
        raise UserError(self._does_not_fit(self._gpu, length, patches))

    def _tensor_parallel_sizes(self, gpus: int) -> list[int]:
        """Return the sizes that divide the model and the GPUs, smallest first: each costs communication a layer."""
        model = self._model
        divided = (gpus, model.num_heads, model.num_kv_heads, model.intermediate_size, model.vocab_size)
        return [size for size in TENSOR_PARALLEL if all(count % size == 0 for count in divided)]

    def _choices(self, gpu: GPU, tensor_parallel: int, length: int, global_batch: int) -> Iterator[tuple[int, Compute]]:
        """Yield micro-batch sizes and ways to compute, fastest first."""
        fp8, depth = self._fp8(gpu), self._vision_depth
        share = global_batch // (self._gpus // tensor_parallel)  # packs of a step that one model replica has
        for micro_batch in (8, 4, 2):
            if share % micro_batch == 0 and micro_batch * length <= MOST_TOKENS:
                yield micro_batch, Compute(fp8)
        # To save 0.7 GB a recomputed vision block costs 1.4 ms (18,816 patches), a layer of 3B 2 ms (8192 tokens).
        for blocks in range(depth + 1):
            yield 1, Compute(fp8, 0, blocks)
        # Recompute at most a quarter of the layers, a twelfth of the work, before the model is split further.
        most = self._model.num_layers // (1 if tensor_parallel == self._tensor_parallel_sizes(self._gpus)[-1] else 4)
        for layers in range(1, most + 1):
            yield 1, Compute(fp8, layers, depth)

    def _reason(self, gpu: GPU, tensor_parallel: int, packs: str, compute: Compute, memory: float) -> str:
        """Return the choice as one sentence."""
        parts = [
            "the whole model on each GPU" if tensor_parallel == 1 else f"tensor parallel over {tensor_parallel} GPUs",
            f"optimizer state over {self._gpus // tensor_parallel} data-parallel rank(s)",
            f"{packs} in one CUDA graph",
            "fp8 in the layers' matrix products" if compute.fp8 else "bfloat16",
        ]
        if compute.recomputed_blocks:
            parts.append(f"recompute {compute.recomputed_blocks} of {self._vision_depth} vision blocks")
        if compute.recomputed_layers:
            parts.append(f"recompute {compute.recomputed_layers} of {self._model.num_layers} layers")
        return f"{', '.join(parts)}: {memory / GB:.0f} of {gpu.usable / GB:.0f} usable GB a GPU predicted"

    def _does_not_fit(self, gpu: GPU, length: int, patches: int) -> str:
        """Return the error: what the least memory would be, and the fewest GPUs that have it."""
        tensor_parallel = self._tensor_parallel_sizes(self._gpus)[-1]
        least = self._least_memory(gpu, self._gpus, tensor_parallel, length, patches)
        way_out = f"no number of them up to {MOST_GPUS} can: use a smaller model or shorter packs"
        for gpus in (n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, MOST_GPUS) if n > self._gpus):
            sizes = self._tensor_parallel_sizes(gpus)
            if any(self._least_memory(gpu, gpus, size, length, patches) <= gpu.usable for size in sizes):
                way_out = f"{gpus} are the fewest that can"
                break
        return (
            f"{self._gpus} x {gpu.name} cannot train this model on packs of {length}: even over {tensor_parallel} "
            f"GPU(s) a GPU needs {least / GB:.0f} GB and has {gpu.usable / GB:.0f} usable; {way_out}"
        )

    def _least_memory(self, gpu: GPU, gpus: int, tensor_parallel: int, length: int, patches: int) -> float:
        """Return the peak with one pack a micro-batch and everything recomputed."""
        return self._memory.peak(
            tensor_parallel=tensor_parallel,
            data_parallel=gpus // tensor_parallel,
            tokens=length,
            patches=patches,
            compute=Compute(self._fp8(gpu), self._model.num_layers, self._vision_depth),
        )

    def _fp8(self, gpu: GPU) -> bool:
        return gpu.fp8 and self._model.hidden_size >= FP8_HIDDEN

    @property
    def _vision_depth(self) -> int:
        return self._model.vision.depth if self._model.vision else 0
