"""A micro-batch's forward and backward pass as one CUDA graph: the host gives one order, not 5,000.

Launching kernels one by one, a small model's GPU waits for the host (0.5B, one pack: 16 % MFU eager, 36 % replayed).
All shapes are static, so one graph serves every batch, whatever its segments and images; images come in a few
shape buckets of patches, each with its graph.
"""

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from trainer.data.batch import Batch

WARM_UP = 2  # runs before the first capture: kernels are chosen, workspaces made


class Graphed:
    """`work` on a static copy of a batch, captured once for each number of patches and replayed from then on.

    Must be made and called on the stream that the model was built on, which is not the default one: autograd runs a
    gradient's accumulation on the stream where its parameter was first seen. What `work` adds to during the warm-up
    (gradients, sums) is the caller's to clear, hence `prepare`.
    """

    def __init__(self, work: Callable[[Batch], None], device: torch.device):
        self._work, self._device = work, device
        self._graphs: dict[int, tuple[Batch, torch.cuda.CUDAGraph]] = {}  # by number of patches

    @property
    def ready(self) -> bool:
        return self.captured > 0

    @property
    def captured(self) -> int:
        """Graphs so far."""
        return len(self._graphs)

    def prepare(self, example: Batch, most: int) -> None:
        """Warm up on this batch, and capture for `most` patches: the other graphs then fit into that one's memory."""
        static = example.to(self._device)
        for _ in range(WARM_UP):
            self._work(static)
        torch.cuda.synchronize()
        self._capture(_grown(static, most))

    def __call__(self, batch: Batch) -> None:
        assert self.ready, "prepare first"
        if _patches(batch) not in self._graphs:
            self._capture(batch.to(self._device))
        static, graph = self._graphs[_patches(batch)]
        for target, source in zip(_tensors(static), _tensors(batch), strict=True):
            target.copy_(source, non_blocking=True)
        graph.replay()

    def close(self) -> None:
        """Free the graphs. NCCL never ends a communicator that one with its collectives still refers to."""
        for _, graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def _capture(self, static: Batch) -> None:
        """Nothing runs, so it does not matter what the batch holds."""
        # One pool for all: they run one after the other, and what they leave behind lies outside of it.
        pool = next((graph.pool() for _, graph in self._graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        self._graphs[_patches(static)] = static, graph  # before its capture: should that fail, `close` frees it
        # The loader's threads pin memory meanwhile, which a capture that watches all threads would not survive.
        with torch.cuda.graph(graph, pool, torch.cuda.current_stream(), "thread_local"):
            self._work(static)


def _patches(batch: Batch) -> int:
    return 0 if batch.vision is None else len(batch.vision.patches)


def _grown(batch: Batch, patches: int) -> Batch:
    """Return the batch with room for `patches` patches."""
    return batch if batch.vision is None else replace(batch, vision=batch.vision.empty(patches))


def _tensors(batch: Batch) -> list[Tensor]:
    tensors = [getattr(batch, f.name) for f in fields(Batch) if f.name != "vision"]
    return tensors + (batch.vision.tensors() if batch.vision else [])
