"""Two tensor-parallel ranks make the same weights, logits, loss and gradients as one process with the whole model."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads

from tests.support.model_golden import Example, batch_of
from tests.support.processes import run_ranks
from tests.support.qwen3_assets import tiny_qwen3_folder
from tests.support.qwen3_vl_assets import tiny_qwen3_vl_folder
from tests.support.qwen_assets import tiny_text_folder, tiny_vl_folder
from tests.support.two_processes import assert_two_train_as_one
from trainer.models.config import ModelConfig
from trainer.models.initialize import build_model
from trainer.optim.data_parallel import OverlappedDataParallel
from trainer.runtime import Runtime


@pytest.mark.parametrize("make", [tiny_text_folder, tiny_qwen3_folder])
def test_two_processes_are_one_model(make: Any, tmp_path: Path) -> None:
    make(tmp_path, tied=False)
    report(tmp_path, 1)
    run_ranks(2, "-m", "tests.integration.test_tensor_parallel", str(tmp_path), "2")
    one, two = (json.loads((tmp_path / f"{world}.json").read_text()) for world in (1, 2))
    assert one["logits"] > 1
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("make", [tiny_vl_folder, tiny_qwen3_vl_folder])
def test_two_processes_train_one_model_and_one_goes_on(make: Any, tmp_path: Path) -> None:
    assert_two_train_as_one(tmp_path, tensor_parallel=2, tolerance=1e-4, make_model=make)


@pytest.mark.parametrize(
    ("world", "weight_shards", "exchange"),
    [
        (3, 3, "within a node"),  # which do not divide the vocabulary
        (4, 2, "within a node"),  # two ranks have the same parts
        (4, 4, "between nodes"),  # layers over all ranks, the vocabulary over those of a node
    ],
)
def test_processes_that_share_the_weights_train_as_one(
    world: int, weight_shards: int, exchange: str, tmp_path: Path
) -> None:
    assert_two_train_as_one(tmp_path, weight_shards=weight_shards, world=world, exchange=exchange, tolerance=1e-4)


def report(folder: Path, tensor_parallel: int) -> None:
    """What the model makes of a batch, in sums of squares over the whole model, however it is split."""
    with Runtime.start(tensor_parallel=tensor_parallel, seed=7) as runtime:
        config = ModelConfig.from_hf(str(folder))
        model = build_model(config, runtime)
        ddp = OverlappedDataParallel(model.config, model)
        ids = torch.randint(0, config.vocab_size, (250,), generator=torch.Generator().manual_seed(0))
        batch = batch_of(config, [[Example(ids[:150], ids[:150] > 9), Example(ids[150:], ids[150:] > 9)]], length=256)
        numbers: dict[str, Any] = {"logits": model.logits(batch).square().sum().item()}
        loss = ddp(batch)
        loss.backward()
        finalize_model_grads([ddp], batch.loss_mask.sum())
        numbers["loss"] = loss.item()
        for name, parameter in model.named_parameters():
            for what, tensor in (("weight", parameter.detach()), ("gradient", parameter.main_grad)):
                total = tensor.square().sum()
                if getattr(parameter, "tensor_model_parallel", False):
                    torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
                numbers[f"{name} {what}"] = total.item()
        if runtime.rank == 0:
            (folder / f"{tensor_parallel}.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    report(Path(sys.argv[1]), int(sys.argv[2]))
