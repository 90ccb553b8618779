"""Two data-parallel ranks have the gradients, the losses and the weights of one rank, in every bucket.

And the comparison is worth something: each bucket's exchange, forgotten or done twice, makes it fail.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
TOLERANCE = 1e-3  # of a sum of squares, relative
NAP = 0.5  # seconds that rank 1 works longer, in one step


@pytest.mark.parametrize(("images", "global_batch"), [(False, 4), (True, 2)])
def test_two_ranks_train_as_one(images: bool, global_batch: int, tmp_path: Path) -> None:
    values = write_job(tmp_path, images=images) | {"global_batch": global_batch, "steps": STEPS}
    one = report(values | {"output": str(tmp_path / "one")}, 1)
    two = launch(values | {"output": str(tmp_path / "two")})
    assert one["buckets"] >= 4
    assert two["buckets"] >= 4
    assert two["text only on one rank"] == images
    for what in ("gradients", "weights"):
        assert different(two[what], one[what]) == []
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["made"] == pytest.approx(one["made"], rel=1e-4)  # summed over the ranks, as the loss of all
    assert two["tokens"] == one["tokens"]
    assert len(set(one["losses"])) == STEPS
    # Whichever the bucket. (All weights of a bucket gathered twice are what they were gathered once.)
    assert two["caught"] == {
        what: ["caught"] * two["buckets"]
        for what in ("reduce-scatter forgotten", "reduce-scatter twice", "gather forgotten")
    }
    work, waited = two["times"]
    assert work[1] - work[0] > NAP / 2
    assert max(waited) < NAP / 2


def different(found: dict[str, float], expected: dict[str, float]) -> list[str]:
    """Names whose sums of squares differ by more than noise, which is all of a key bias's gradient: 0 in theory."""
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if found[name] != pytest.approx(value, rel=TOLERANCE, abs=1e-10)]


def launch(values: dict[str, Any]) -> dict[str, Any]:
    printed = run_ranks(2, "-m", "tests.integration.test_data_parallel", json.dumps(values))
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


def report(values: dict[str, Any], world: int) -> dict[str, Any]:
    """What this rank has: sums of squares of the first step's gradients and of the last weights, and all losses."""
    run = Run.prepare(TrainConfig(**values), world, cuda=False)
    with Runtime.start(seed=run.config.seed) as runtime, Trainer(run, runtime) as trainer:
        steps = list(islice(trainer.stream.batches(0), STEPS))
        first = gradients(trainer, steps[0])
        rates = [learning_rate(run.config, i, STEPS) for i in range(STEPS)]
        losses = [trainer.train_step(packs, lr).losses for packs, lr in zip(steps, rates, strict=True)]
        weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        assert weights_agree(trainer)
        result: dict[str, Any] = {
            "buckets": len(trainer.ddp.bucket_groups),
            "text only on one rank": any(text_only_on_one_rank(packs) for packs in steps),
            "gradients": first,
            "weights": squares(weights),
            "losses": [step.mean for step in losses],
            "made": [step.by_dataset["made"] for step in losses],
            "tokens": [step.tokens_by_dataset for step in losses],
        }
        if world > 1:
            result["times"] = times_with_a_slow_rank(trainer, steps[0])
            patches = torch.tensor([float(sum(pack.real_patches for pack in packs)) for packs in steps])
            dist.all_reduce(patches)
            fullest = steps[int(patches.argmax())]  # without images the tower has no gradients
            result["caught"] = faults(trainer, fullest)
        return result


def gradients(trainer: Trainer, packs: Sequence[Batch]) -> dict[str, float]:
    """Sums of squares of one step's, each gradient whole: a rank has its part of every bucket."""
    trainer.ddp.zero_grad_buffer()
    trainer.sums.clear()
    for pack in packs:
        trainer._forward_backward(pack)
    finalize_model_grads([trainer.ddp], trainer.sums.trained())
    for group in trainer.ddp.bucket_groups:
        for bucket in group.buckets:
            parts = bucket.grad_data.chunk(trainer.runtime.data_world)
            dist.all_gather_into_tensor(bucket.grad_data, parts[trainer.runtime.data_rank].clone())
    return squares({name: parameter.main_grad for name, parameter in trainer.model.named_parameters()})


def squares(tensors: dict[str, Tensor]) -> dict[str, float]:
    return {name: tensor.square().sum().item() for name, tensor in tensors.items()}


def weights_agree(trainer: Trainer) -> bool:
    """Whether all ranks have the same: a gather that was forgotten leaves an old half."""
    agree = True
    for weight in trainer.model.parameters():
        others = weight.detach().clone()
        dist.broadcast(others, src=0)
        agree &= torch.equal(others, weight)
    verdict = torch.tensor(float(agree))
    dist.all_reduce(verdict, dist.ReduceOp.MIN)
    return bool(verdict.item())


def faults(trainer: Trainer, packs: Sequence[Batch]) -> dict[str, list[str]]:
    """For each fault and bucket "caught", or what went unseen."""
    right, buckets = gradients(trainer, packs), list(trainer.ddp.bucket_groups)
    caught: dict[str, list[str]] = {}
    for what, times in (("reduce-scatter forgotten", 0), ("reduce-scatter twice", 2)):
        for bucket in buckets:
            with repeated(bucket, "start_grad_sync", times):
                wrong = different(gradients(trainer, packs), right)
            caught.setdefault(what, []).append("caught" if wrong else "gradients are as they should be")
    assert different(gradients(trainer, packs), right) == []
    for bucket in buckets:
        with repeated(bucket, "start_param_sync", 0):
            trainer.train_step(packs, 1e-3)
        caught.setdefault("gather forgotten", []).append("unseen" if weights_agree(trainer) else "caught")
        trainer.train_step(packs, 1e-3)  # gathers what is missing
        assert weights_agree(trainer)
    return caught


@contextmanager
def repeated(owner: Any, name: str, times: int) -> Iterator[None]:
    """While entered, a call of owner.name is `times` calls."""
    function: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> None:
        for _ in range(times):
            function(*args, **kwargs)

    setattr(owner, name, call)
    yield
    delattr(owner, name)


def times_with_a_slow_rank(trainer: Trainer, packs: Sequence[Batch]) -> tuple[Sequence[float], Sequence[float]]:
    """What every rank knows of the ranks' times in a step in which rank 1 works longer."""
    work = trainer._forward_backward

    def slow(batch: Batch) -> None:
        work(batch)
        time.sleep(NAP / len(packs) * trainer.runtime.data_rank)

    trainer._forward_backward = slow  # type: ignore[method-assign]
    ranks = trainer.train_step(packs, 1e-3).ranks
    trainer._forward_backward = work  # type: ignore[method-assign]
    return ranks.work, ranks.waited


def text_only_on_one_rank(packs: Sequence[Batch]) -> bool:
    """Whether this rank's packs of a step have no image, and another rank's do."""
    images = torch.tensor([float(any(pack.real_patches for pack in packs))])
    dist.all_reduce(images)
    return 0 < images.item() < dist.get_world_size()


if __name__ == "__main__":
    result = report(json.loads(sys.argv[1]), int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        print(json.dumps(result))
