"""A tiny training by two processes, as data-parallel ranks or as one model's two halves, beside the same by one."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import run_ranks
from tests.support.qwen_assets import tiny_vl_folder
from tests.support.training_job import metrics_of, train, write_job
from trainer.config import TrainConfig
from trainer.optim.data_parallel import OverlappedDataParallel
from trainer.optim.sharded_layers import ShardedLayers
from trainer.runtime import Runtime
from trainer.trainer import Run, Trainer


def assert_two_train_as_one(
    folder: Path,
    *,
    tolerance: float,
    tensor_parallel: int = 1,
    weight_shards: int = 1,
    world: int = 2,
    exchange: str = "as it is",
    make_model: Callable[[Path], Path] | None = None,
) -> None:
    """And one goes on from what two have saved, and two from what one has. tolerance: of losses, relative.

    make_model: None for a Qwen2.5-VL of layers enough that a buffer which two share is used again in both passes.
    """
    one = write_job(folder, images=True, make_model=make_model or partial(tiny_vl_folder, layers=5))
    one["global_batch"] = world * -(-one["global_batch"] // world)
    two = one | {"output": str(folder / "two")}
    layout = json.dumps({"tensor_parallel": tensor_parallel, "weight_shards": weight_shards})
    train(one)
    _launch(two, layout, exchange, world=world)
    more = {"steps": one["steps"] + 2}
    train(two | more)
    _launch(one | more, layout, exchange, world=world)
    for expected, found in zip(metrics_of(one), metrics_of(two), strict=True):
        assert found["trained_tokens"] == expected["trained_tokens"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        # Adam's first updates are by the gradients' signs, so noise grows: 5.7 % at the 7th step of two halves in bf16.
        norm = 2 * tolerance if found["step"] == 1 else 10 * tolerance
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=norm), (expected, found)
    held_out = metrics_of(one)[-1]["validation_loss"]
    assert metrics_of(two)[-1]["validation_loss"] == pytest.approx(held_out, rel=tolerance)


def assert_overlap_changes_nothing(folder: Path, *, weight_shards: int = 1) -> None:
    """Two ranks whose exchange runs beside compute have, to the last bit, the losses of two that take turns with it.

    Sums over two ranks have one order. All-gathers are delayed by more than a step takes: a layer that does not wait
    for its weights trains on old ones. Gradients that are reduced too early miss what the backward pass adds later.
    """
    values = write_job(folder, images=True, make_model=partial(tiny_vl_folder, layers=5))
    curves = {}
    for exchange in ("in turns", "late"):
        job = values | {"output": str(folder / exchange)}
        _launch(job, json.dumps({"tensor_parallel": 1, "weight_shards": weight_shards}), exchange)
        curves[exchange] = [(line["loss"], line["grad_norm"], line["validation_loss"]) for line in metrics_of(job)]
    assert curves["late"] == curves["in turns"]


def _launch(values: dict[str, Any], *arguments: str, world: int = 2) -> None:
    run_ranks(world, "-m", "tests.support.two_processes", json.dumps(values), *arguments)


def set_exchange(ddp: OverlappedDataParallel, exchange: str) -> None:
    """ "in turns": neither starts before the other is done. "late": every all-gather waits some 20 ms first."""
    if exchange == "in turns":
        for name in ("finish_grad_sync", "_start_bucket_group_param_sync"):
            setattr(ddp, name, settled(getattr(ddp, name)))
    if exchange == "late":
        for bucket in ddp.bucket_groups:
            bucket.start_param_sync = delayed(bucket.start_param_sync)
        for layers in (shards for shards in ddp.sharded if isinstance(shards, ShardedLayers)):
            for stream in (layers._copies, layers._sums):
                setattr(stream, "wait_stream", delayed_on(stream))  # noqa: B010 (mypy refuses an assignment)


def settled(function: Callable[..., None]) -> Callable[..., None]:
    def call(*args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        function(*args, **kwargs)
        torch.cuda.synchronize()

    return call


def delayed(function: Callable[..., None]) -> Callable[..., None]:
    def call(*args: Any, **kwargs: Any) -> None:
        torch.cuda._sleep(40_000_000)  # cycles, on the current stream
        function(*args, **kwargs)

    return call


def delayed_on(stream: torch.cuda.Stream) -> Callable[[torch.cuda.Stream], None]:
    """`stream.wait_stream`, after which the stream does nothing for some 2 ms: more than a tiny layer takes."""
    wait = stream.wait_stream

    def call(other: torch.cuda.Stream) -> None:
        wait(other)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(4_000_000)

    return call


def work(values: dict[str, Any], layout: dict[str, int], exchange: str) -> None:
    if exchange == "between nodes":
        os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // 2)
    run = Run.prepare(TrainConfig(**values), int(os.environ["WORLD_SIZE"]), torch.cuda.is_available())
    run = replace(run, layout=replace(run.layout, **layout))
    # One planned for another split may have micro-batches of more packs than a rank has.
    packs = run.config.global_batch * run.layout.tensor_parallel // int(os.environ["WORLD_SIZE"])
    run = replace(run, layout=replace(run.layout, micro_batch=min(run.layout.micro_batch, packs)))
    with (
        Runtime.start(
            tensor_parallel=run.layout.tensor_parallel, weight_shards=run.layout.weight_shards, seed=run.config.seed
        ) as runtime,
        Trainer(run, runtime) as trainer,
    ):
        set_exchange(trainer.ddp, exchange)
        trainer.train()


if __name__ == "__main__":
    work(json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
