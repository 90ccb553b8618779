"""A tiny training by two processes, as data-parallel ranks or as one model's two halves, beside the same by one."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training_job import ROOT, metrics_of, train, write_job
from trainer.config import TrainConfig
from trainer.runtime import Runtime
from trainer.trainer import Run, Trainer


def assert_two_train_as_one(folder: Path, *, tensor_parallel: int, tolerance: float) -> None:
    """And one goes on from what two have saved. tolerance: of losses, relative."""
    one = write_job(folder, images=True)
    two = one | {"output": str(folder / "two")}
    train(one)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = ["-m", "tests.support.two_processes", json.dumps(two), str(tensor_parallel)]
    done = subprocess.run([*torchrun, *worker], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for values in (one, two):
        train(values | {"steps": one["steps"] + 2})
    for expected, found in zip(metrics_of(one), metrics_of(two), strict=True):
        assert found["trained_tokens"] == expected["trained_tokens"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5 * tolerance)
    held_out = metrics_of(one)[-1]["validation_loss"]
    assert metrics_of(two)[-1]["validation_loss"] == pytest.approx(held_out, rel=tolerance)


def work(values: dict[str, Any], tensor_parallel: int) -> None:
    run = Run.prepare(TrainConfig(**values), 2, torch.cuda.is_available())
    run = replace(run, layout=replace(run.layout, tensor_parallel=tensor_parallel))
    seed = run.config.seed
    with Runtime.start(tensor_parallel=tensor_parallel, seed=seed) as runtime, Trainer(run, runtime) as trainer:
        trainer.train()


if __name__ == "__main__":
    work(json.loads(sys.argv[1]), int(sys.argv[2]))
