"""Two data-parallel ranks have the gradients, the losses and the weights of one rank, in every bucket."""

import json
import os
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from tests.support.processes import run_ranks
from tests.support.training_job import write_job
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.optim.optimizer import learning_rate
from trainer.runtime import Runtime
from trainer.trainer import Run, Trainer

STEPS = 20


@pytest.mark.parametrize(("images", "global_batch"), [(False, 4), (True, 2)])
def test_two_ranks_train_as_one(images: bool, global_batch: int, tmp_path: Path) -> None:
    values = write_job(tmp_path, images=images) | {"global_batch": global_batch, "steps": STEPS}
    one, two = (run(values | {"output": str(tmp_path / f"out{world}")}, world) for world in (1, 2))
    assert one["buckets"] >= 4
    assert two["buckets"] >= 4
    assert two["text only on one rank"] == images
    for what in ("gradients", "weights"):
        assert two[what].keys() == one[what].keys()
        for name, value in one[what].items():
            assert two[what][name] == pytest.approx(value, rel=1e-3, abs=1e-6), (what, name)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["made"] == pytest.approx(one["made"], rel=1e-4)  # summed over the ranks, as the loss of all
    assert two["tokens"] == one["tokens"]
    assert len(set(one["losses"])) == STEPS


def run(values: dict[str, Any], world: int) -> dict[str, Any]:
    printed = run_ranks(world, "-m", "tests.integration.test_data_parallel", json.dumps(values))
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


def report(values: dict[str, Any]) -> dict[str, Any]:
    """What this rank has: sums of squares of the first step's gradients and of the last weights, and all losses."""
    run = Run.prepare(TrainConfig(**values), int(os.environ["WORLD_SIZE"]), cuda=False)
    with Runtime.start(seed=run.config.seed) as runtime, Trainer(run, runtime) as trainer:
        steps = list(islice(trainer.stream.batches(0), STEPS))
        first = gradients(trainer, steps[0])
        rates = [learning_rate(run.config, i, STEPS) for i in range(STEPS)]
        losses = [trainer.train_step(packs, lr).losses for packs, lr in zip(steps, rates, strict=True)]
        weights = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
        for weight in weights.values():  # a gather that was forgotten leaves an old half
            others = weight.clone()
            dist.broadcast(others, src=0)
            assert torch.equal(others, weight)
        return {
            "buckets": len(trainer.ddp.bucket_groups),
            "text only on one rank": any(text_only_on_one_rank(packs) for packs in steps),
            "gradients": {name: gradient.square().sum().item() for name, gradient in first.items()},
            "weights": {name: weight.square().sum().item() for name, weight in weights.items()},
            "losses": [step.mean for step in losses],
            "made": [step.by_dataset["made"] for step in losses],
            "tokens": [step.tokens_by_dataset for step in losses],
        }


def gradients(trainer: Trainer, packs: Sequence[Batch]) -> dict[str, Tensor]:
    """Of one step, each whole: a rank has its part of every bucket."""
    trainer.ddp.zero_grad_buffer()
    trainer.sums.clear()
    for pack in packs:
        trainer._forward_backward(pack)
    finalize_model_grads([trainer.ddp], trainer.sums.trained())
    for group in trainer.ddp.bucket_groups:
        for bucket in group.buckets:
            parts = bucket.grad_data.chunk(trainer.runtime.data_world)
            dist.all_gather_into_tensor(bucket.grad_data, parts[trainer.runtime.data_rank].clone())
    return {name: parameter.main_grad.clone() for name, parameter in trainer.model.named_parameters()}


def text_only_on_one_rank(packs: Sequence[Batch]) -> bool:
    """Whether this rank's packs of a step have no image, and another rank's do."""
    images = torch.tensor([float(any(pack.real_patches for pack in packs))])
    dist.all_reduce(images)
    return 0 < images.item() < dist.get_world_size()


if __name__ == "__main__":
    result = report(json.loads(sys.argv[1]))
    if os.environ["RANK"] == "0":
        print(json.dumps(result))
