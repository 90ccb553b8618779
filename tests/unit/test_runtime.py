"""The CPU runtime: megatron.core's groups exist, its CUDA calls work, and all of it goes away again."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from tests.model_golden import Example, batch_of
from tests.qwen_assets import tiny_text_folder
from trainer.model import ModelConfig, build_model
from trainer.runtime import Runtime

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the emulation is for machines without CUDA")


def test_one_process_without_torchrun() -> None:
    with Runtime.start(seed=5) as runtime:
        assert (runtime.device, runtime.dtype) == (torch.device("cpu"), torch.float32)
        assert (runtime.rank, runtime.world, runtime.data_rank, runtime.data_world, runtime.tensor_rank) == (
            0,
            1,
            0,
            1,
            0,
        )
        assert not runtime.cuda
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
        total = torch.ones(3)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        assert total.tolist() == [1, 1, 1]


def test_cuda_is_the_cpu_while_it_runs_and_not_after() -> None:
    before = (torch.cuda.current_device, torch.cuda.Stream, torch.cuda.stream)
    runtime = Runtime.start()
    made = torch.zeros(2, device="cuda", dtype=torch.bfloat16)
    assert made.device.type == "cpu"
    assert made.to("cuda:0").device.type == "cpu"
    assert made.cuda() is made
    assert made.type() == "torch.cuda.BFloat16Tensor"
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())

    runtime.shutdown()
    runtime.shutdown()  # a second call does nothing
    assert (torch.cuda.current_device, torch.cuda.Stream, torch.cuda.stream) == before
    assert torch.zeros(2).type() == "torch.FloatTensor"
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_a_failed_start_leaves_nothing_behind() -> None:
    with pytest.raises(RuntimeError, match="world_size"):
        Runtime.start(tensor_parallel=2)
    assert not dist.is_initialized()
    with Runtime.start() as runtime:
        assert runtime.world == 1


def test_seed_decides_random_numbers() -> None:
    drawn = []
    for seed in (1, 1, 2):
        with Runtime.start(seed=seed):
            drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_distributed_optimizer_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Steps after a load are those after the save. Without the emulation AdamW counts its steps wrong from there on."""
    ids = torch.randint(0, 600, (64,), generator=torch.Generator().manual_seed(0))
    config = ModelConfig.from_hf(str(tiny_text_folder(tmp_path / "hf")))
    batch = batch_of(config, [[Example(ids, ids > 9)]], length=64)
    sharding = {"distrib_optim_sharding_type": "fully_reshardable"}

    class Job:
        def __init__(self, runtime: Runtime) -> None:
            self.model = build_model(config, runtime)
            ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
            self.ddp = DistributedDataParallel(self.model.config, ddp_config, self.model)
            facts = OptimizerConfig(lr=1e-2, params_dtype=torch.float32, use_distributed_optimizer=True, clip_grad=1.0)
            self.optimizer = get_megatron_optimizer(facts, [self.ddp])

        def steps(self, count: int) -> list[float]:
            losses = []
            for _ in range(count):
                self.ddp.zero_grad_buffer()
                self.optimizer.zero_grad()
                loss = self.ddp(batch)
                loss.backward()
                finalize_model_grads([self.ddp], batch.loss_mask.sum())
                self.optimizer.step()
                losses.append(loss.item())
            return losses

        def state(self, loading: bool) -> dict[str, Any]:
            state = {"model": self.model.sharded_state_dict(metadata={"non_homogeneous_layers": True})}
            state["optimizer"] = self.optimizer.sharded_state_dict(state, is_loading=loading, metadata=sharding)
            return state

    (tmp_path / "saved").mkdir()
    with Runtime.start() as runtime:
        job, other = Job(runtime), Job(runtime)
        job.steps(2)
        dist_checkpointing.save(job.state(loading=False), str(tmp_path / "saved"))
        expected = job.steps(3)

        other.steps(1)  # torch's AdamW has no state to load into before its first step
        loaded = dist_checkpointing.load(other.state(loading=True), str(tmp_path / "saved"))
        other.model.load_state_dict(loaded["model"])
        other.optimizer.load_state_dict(loaded["optimizer"])
        assert other.steps(3) == expected
        assert all(torch.equal(a, b) for a, b in zip(job.model.parameters(), other.model.parameters()))
