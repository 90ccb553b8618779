"""The CPU runtime: megatron.core's groups exist, its CUDA calls work, and all of it goes away again."""

import os

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

import trainer.runtime as runtime_module
from kanyun.errors import UserError
from trainer.runtime import Runtime

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the emulation is for machines without CUDA")


def test_one_process_without_torchrun() -> None:
    with Runtime.start(seed=5) as runtime:
        assert (runtime.device, runtime.dtype) == (torch.device("cpu"), torch.float32)
        assert (runtime.rank, runtime.world_size, runtime.dp_rank, runtime.dp_size, runtime.tp_rank) == (
            0,
            1,
            0,
            1,
            0,
        )
        assert not runtime.cuda
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
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
        assert runtime.world_size == 1


def test_a_gpu_without_transformer_engine_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no Transformer Engine: `make setup-gpu` adds it"):
        Runtime.start()


def test_seed_decides_random_numbers() -> None:
    drawn = []
    for seed in (1, 1, 2):
        with Runtime.start(seed=seed):
            drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
