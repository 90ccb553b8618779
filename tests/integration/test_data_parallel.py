"""Two data-parallel ranks have the gradients, the losses and the weights of one rank, in every bucket.

And the comparison is worth something: each bucket's exchange, forgotten or done twice, makes it fail.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from tests.support.processes import run_ranks
from tests.support.qwen_assets import tiny_text_folder, tiny_vl_folder
from tests.support.training_job import write_job
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.kernels.vocabulary_shard import VocabularyShard
from trainer.optim.optimizer import learning_rate
from trainer.runtime import Runtime
from trainer.trainer import Run, Trainer

STEPS = 20
LAYERS = 5  # two of them share a buffer where weights are sharded
TOLERANCE = 1e-3  # of a sum of squares, relative
NAP = 0.5  # seconds that rank 1 works longer, in each of three steps


@pytest.fixture(scope="module", params=["text", "images"])
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The job, and what one rank has, here."""
    folder, images = tmp_path_factory.mktemp(request.param), request.param == "images"
    make = partial(tiny_vl_folder if images else tiny_text_folder, layers=LAYERS)
    values = write_job(folder, images=images, make_model=make)
    values |= {"global_batch": 2 if images else 4, "steps": STEPS}
    return values, report(values | {"output": str(folder / "one")}, 1)


@pytest.fixture(scope="module", params=[1, 2], ids=["whole weights", "sharded weights"])
def reports(
    request: pytest.FixtureRequest, alone: tuple[dict[str, Any], dict[str, Any]]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The faults to look for, what one rank has, and what each of two has."""
    values, one = alone
    values = values | {"output": f"{values['output']}{request.param}"}
    printed = run_ranks(2, "-m", "tests.integration.test_data_parallel", json.dumps(values), str(request.param))
    return ("layer" if request.param > 1 else "bucket"), one, json.loads(printed.splitlines()[-1])


def test_two_ranks_train_as_one(reports: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    _, one, two = reports
    assert one["buckets"] >= 4
    assert two["text only on one rank"] == two["images"]
    for what in ("gradients", "weights"):
        assert different(two[what], one[what]) == []
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["made"] == pytest.approx(one["made"], rel=1e-4)  # summed over the ranks, as the loss of all
    assert two["tokens"] == one["tokens"]
    assert len(set(one["losses"])) == STEPS


def test_an_exchange_that_is_forgotten_or_done_twice_is_seen(
    reports: tuple[str, dict[str, Any], dict[str, Any]],
) -> None:
    """Whichever the bucket or layer. (Gathered twice, weights are what they were gathered once.)"""
    what, _, two = reports
    assert two["buckets"] >= 4 or what == "layer"
    times = LAYERS if what == "layer" else two["buckets"]
    faults = ("reduce-scatter forgotten", "reduce-scatter twice", "gather forgotten")
    expected = {f"{what}: {fault}": ["caught"] * times for fault in faults}
    if what == "layer":
        tables = 1 if two["tied"] else 2
        expected |= {f"vocabulary: {fault}": ["caught"] * tables for fault in VOCABULARY_FAULTS}
    assert two["caught"] == expected


def test_every_rank_knows_which_one_is_slow(reports: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    if reports[0] == "layer":
        pytest.skip("ranks that share the layers wait for one another within their passes: all take as long")
    work, waited = reports[2]["times"]
    assert work[1] - work[0] > NAP / 2
    assert max(waited) < NAP / 2


def different(found: dict[str, float], expected: dict[str, float]) -> list[str]:
    """Names whose sums of squares differ by more than noise, which is all of a key bias's gradient: 0 in theory."""
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if found[name] != pytest.approx(value, rel=TOLERANCE, abs=1e-10)]


def report(values: dict[str, Any], world: int, weight_shards: int = 1) -> dict[str, Any]:
    """Return of this rank the sums of squares of the first step's gradients and of the last weights, and all losses."""
    run = Run.prepare(TrainConfig(**values), world, cuda=False)
    run = replace(run, layout=replace(run.layout, weight_shards=weight_shards))
    start = Runtime.start(seed=run.config.seed, weight_shards=weight_shards)
    with start as runtime, Trainer(run, runtime) as trainer:
        steps = list(islice(trainer.stream.batches(0), STEPS))
        first = gradients(trainer, steps[0])
        rates = [learning_rate(run.config, i, STEPS) for i in range(STEPS)]
        losses = [trainer.train_step(packs, lr).losses for packs, lr in zip(steps, rates, strict=True)]
        weights = dict(whole_tensors(trainer, "weights"))
        assert weights_agree(trainer)
        result: dict[str, Any] = {
            "buckets": len(trainer.ddp.bucket_groups),
            "images": run.model.vision is not None,
            "tied": run.model.tied,
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
            result["caught"] = layer_faults(trainer, fullest) if weight_shards > 1 else faults(trainer, fullest)
        return result


def gradients(trainer: Trainer, packs: Sequence[Batch]) -> dict[str, float]:
    """Return the sum of squares of each gradient of one step, put together from every rank's part of its bucket."""
    trainer.ddp.zero_grad_buffer()
    trainer.sums.clear()
    for pack in packs:
        trainer._forward_backward(pack)
    finalize_model_grads([trainer.ddp], trainer.sums.trained())
    for group in trainer.ddp.bucket_groups:
        for bucket in group.buckets:
            parts = bucket.grad_data.chunk(trainer.runtime.dp_size)
            dist.all_gather_into_tensor(bucket.grad_data, parts[trainer.runtime.dp_rank].clone())
    return squares(dict(whole_tensors(trainer, "gradients")))


def whole_tensors(trainer: Trainer, what: str) -> Iterator[tuple[str, Tensor]]:
    """Return weights or gradients by name; of what is sharded, the ranks' parts put together."""
    shared = {}
    for shards in trainer.ddp.sharded:
        parts = torch.stack([weight.detach() for weight in shards.weights]) if what == "weights" else shards.gradients
        for number, part in enumerate(parts):
            row = part.new_empty(len(part) * trainer.runtime.dp_size)
            dist.all_gather_into_tensor(row, part.contiguous())
            for parameter, start in zip(shards.parameters[number], shards.row.starts, strict=True):
                shared[parameter] = row[start : start + parameter.numel()]
    for name, parameter in trainer.model.named_parameters():
        if parameter in shared:
            yield name, shared[parameter]
        else:
            yield name, (parameter.detach() if what == "weights" else parameter.main_grad).clone()


def squares(tensors: dict[str, Tensor]) -> dict[str, float]:
    return {name: tensor.square().sum().item() for name, tensor in tensors.items()}


def weights_agree(trainer: Trainer) -> bool:
    """Return whether all ranks have the same weights: a gather that was forgotten leaves an old half."""
    agree = True
    for _, weight in whole_tensors(trainer, "weights"):
        others = weight.clone()
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
            caught.setdefault(f"bucket: {what}", []).append("caught" if wrong else "gradients are as they should be")
    assert different(gradients(trainer, packs), right) == []
    for bucket in buckets:
        with repeated(bucket, "start_param_sync", 0):
            trainer.train_step(packs, 1e-3)
        caught.setdefault("bucket: gather forgotten", []).append("unseen" if weights_agree(trainer) else "caught")
        trainer.train_step(packs, 1e-3)  # gathers what is missing
        assert weights_agree(trainer)
    return caught


def layer_faults(trainer: Trainer, packs: Sequence[Batch]) -> dict[str, list[str]]:
    """As `faults`, for the exchange of sharded layers. A layer that is not gathered computes with another one's row."""
    layers, right = trainer.ddp.sharded[0], gradients(trainer, packs)
    caught: dict[str, list[str]] = {}
    for what, name, times in (
        ("reduce-scatter forgotten", "_reduce", 0),
        ("reduce-scatter twice", "_reduce", 2),
        ("gather forgotten", "_gather", 0),
    ):
        for layer in range(LAYERS):
            with repeated(layers, name, times, only=layer):
                wrong = different(gradients(trainer, packs), right)
            caught.setdefault(f"layer: {what}", []).append("caught" if wrong else "gradients are as they should be")
    assert trainer.model.vocabulary is not None
    for what, (name, fault) in VOCABULARY_FAULTS.items():
        for part in trainer.model.vocabulary._parts:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(VocabularyShard, name, only_of(part, getattr(VocabularyShard, name), fault))
                wrong = different(gradients(trainer, packs), right)
            caught.setdefault(f"vocabulary: {what}", []).append(
                "caught" if wrong else "gradients are as they should be"
            )
    assert different(gradients(trainer, packs), right) == []
    return caught


Exchange = Callable[[VocabularyShard, Tensor], Tensor]
SCATTER_SUM = VocabularyShard.scatter_sum
# Embedding and output head: what is forgotten, or done twice -> the method, and what it returns then.
VOCABULARY_FAULTS: dict[str, tuple[str, Exchange]] = {
    "gather forgotten": ("gather", lambda part, values: torch.cat([values] * part.ranks)),
    "sum forgotten": ("scatter_sum", lambda part, values: values.chunk(part.ranks)[part.rank].clone()),
    "sum twice": ("scatter_sum", lambda part, values: 2 * SCATTER_SUM(part, values)),
}


def only_of(part: VocabularyShard, right: Exchange, fault: Exchange) -> Exchange:
    """`fault` for this part's calls, `right` for another's."""
    return lambda self, values: fault(self, values) if self is part else right(self, values)


@contextmanager
def repeated(owner: Any, name: str, times: int, only: int | None = None) -> Iterator[None]:
    """While entered, a call of owner.name is `times` calls; `only`: one that is given this layer."""
    function: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> None:
        wrong = only is None or args == (only,)
        for _ in range(times if wrong else 1):
            function(*args, **kwargs)
        if name == "_gather" and wrong:  # as if it had been
            owner._held[args[0] % 2], owner._whole[args[0] % 2] = args[0], torch.cuda.Event()

    setattr(owner, name, call)
    yield
    delattr(owner, name)


def times_with_a_slow_rank(trainer: Trainer, packs: Sequence[Batch]) -> tuple[Sequence[float], Sequence[float]]:
    """What every rank knows of the ranks' times in a step in which rank 1 works longer: the least of three such steps,
    as other processes of the machine may slow one of them down."""
    work = trainer._forward_backward

    def slow(batch: Batch) -> None:
        work(batch)
        time.sleep(NAP / len(packs) * trainer.runtime.dp_rank)

    trainer._forward_backward = slow  # type: ignore[method-assign]
    steps = [trainer.train_step(packs, 1e-3).ranks for _ in range(3)]
    trainer._forward_backward = work  # type: ignore[method-assign]
    work_of, waited_of = zip(*(step.work for step in steps)), zip(*(step.waited for step in steps))
    return [min(times) for times in work_of], [min(times) for times in waited_of]


def text_only_on_one_rank(packs: Sequence[Batch]) -> bool:
    """Whether this rank's packs of a step have no image, and another rank's do."""
    images = torch.tensor([float(any(pack.real_patches for pack in packs))])
    dist.all_reduce(images)
    return 0 < images.item() < dist.get_world_size()


if __name__ == "__main__":
    result = report(json.loads(sys.argv[1]), int(os.environ["WORLD_SIZE"]), int(sys.argv[2]))
    if os.environ["RANK"] == "0":
        print(json.dumps(result))
