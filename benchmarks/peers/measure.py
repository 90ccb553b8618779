"""How every peer is measured: whole steps on our packs, in our order, as benchmarks/side_by_side.py measures ours."""

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import islice
from statistics import median
from typing import Any

import torch

from kanyun.fingerprint import fingerprint
from kanyun.storage import Folder
from trainer.config import TrainConfig
from trainer.data.batch import Batch, BatchFormat
from trainer.data.shapes import static_shape
from trainer.data.source import PackedData
from trainer.data.stream import PackStream
from trainer.models.config import ModelConfig
from trainer.models.costs import TRAINING
from trainer.models.registry import costs_of
from trainer.planning.gpus import GPU, find_gpu
from trainer.planning.planner import LayoutPlanner

Step = Callable[[Sequence[Batch]], float]  # trains on the micro-batches of a step, which lie on the CPU; its loss


def measure(
    args: argparse.Namespace,
    config: TrainConfig,
    step: Step,
    *,
    micro_batch: int = 1,
    static: bool = False,
    warm_up: int = 1,
) -> dict[str, Any]:
    """Take `warm_up` steps that are not counted and `args.peer_steps` that are; the median of these is the result.

    `static`: pad the batches' cumulative lengths to one size, for a CUDA graph.
    """
    data, model = _data(config), ModelConfig.from_hf(config.model)
    cuda = torch.cuda.is_available()
    shape = static_shape(data.all, micro_batch, None) if static else None
    batch_format = BatchFormat.of(model, static=shape, pinned=static and cuda)
    costs, seconds, losses, flops = costs_of(model), [], [], 0
    with PackStream(data, batch_format, seed=0, global_batch=args.global_batch, micro_batch=micro_batch) as stream:
        for batches in islice(stream.batches(0), warm_up + args.peer_steps):
            begun = time.perf_counter()
            losses.append(step(batches))
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
            flops = sum(TRAINING * costs.forward_flops(batch) for batch in batches)
    taken = median(seconds[warm_up:])
    manifests = [dataset.manifest for dataset in data.datasets]
    useful = args.global_batch * sum(m.tokens for m in manifests) / sum(m.packs for m in manifests)
    gpu = this_gpu()
    return {
        "tokens/s": useful / taken,
        "TFLOP/s": flops / taken / 1e12,
        "MFU": flops / taken / gpu.flops if gpu else 0,
        "memory GB": torch.cuda.max_memory_reserved() / 1e9,
        "micro-batch": micro_batch,
        "losses": [round(losses[0], 3), round(losses[-1], 3)],
    }


def our_micro_batch(args: argparse.Namespace, config: TrainConfig) -> int:
    """Return the packs of a micro-batch that ours would have: what a peer tries first."""
    model = ModelConfig.from_hf(config.model)
    planner = LayoutPlanner(model, this_gpu(), 1)
    layout = planner.plan(length=config.length, global_batch=args.global_batch)
    return layout.micro_batch


def this_gpu() -> GPU | None:
    return find_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _data(config: TrainConfig) -> PackedData:
    return PackedData(config.data, config.length, fingerprint(Folder(config.model)))
