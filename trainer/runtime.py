"""Where a process runs: on a GPU with NCCL, or on a CPU with gloo.

megatron.core makes tensors on "cuda" and asks for CUDA streams in many places. On a CPU, `CpuAsCuda` answers them: the
only place where anything is emulated.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed

from kanyun.errors import UserError
from trainer.cpu_emulation import CpuAsCuda

_PATIENCE = timedelta(minutes=30)  # at least, of a collective


@dataclass(frozen=True)
class Runtime:
    """One process of a training job: its device, and its place among the others."""

    device: torch.device
    dtype: torch.dtype  # of parameters and activations: float32 on CPU (the reference), bfloat16 on CUDA
    rank: int
    world_size: int
    tensor_parallel: int
    weight_shards: int  # neighbouring data-parallel ranks that share a model's matrices; 1: each has all of them
    seed: int
    deterministic: bool  # on CUDA: only kernels that add in one order. On a CPU all do, so there it is False
    _open: ExitStack = field(repr=False)

    @classmethod
    def start(
        cls,
        *,
        tensor_parallel: int = 1,
        weight_shards: int = 1,
        seed: int = 0,
        hang_after: float = 600,
        deterministic: bool = False,
    ) -> "Runtime":
        """Join the job that torchrun's environment variables describe; without them this process is the whole job.

        `hang_after`: seconds after which trainer/stopping.py ends a rank that waits for another and names that one.

        Use it as a context manager, or call `shutdown` at the end. One runtime a process at a time. Raises UserError on
        a machine that has a GPU and no Transformer Engine.
        """
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cuda = torch.cuda.is_available()
        if cuda and find_spec("transformer_engine") is None:
            raise UserError(
                "this machine has a GPU but no Transformer Engine: `make setup-gpu` adds it, and the image of "
                "docker/Dockerfile.trainer has it; with CUDA_VISIBLE_DEVICES= the CPU trains"
            )
        with ExitStack() as stack:
            if cuda:
                device = torch.device("cuda", local_rank)
                torch.cuda.set_device(device)
                # Not the default one: a CUDA graph is captured on the stream that the model was built on.
                torch.cuda.set_stream(torch.cuda.Stream(device))
            else:
                device = torch.device("cpu")
                stack.enter_context(CpuAsCuda())
                if "RANK" in os.environ:
                    # torchrun sets OMP_NUM_THREADS=1, which leaves cores idle where they are more than its processes.
                    # Without torchrun torch itself takes all cores, or as many as OMP_NUM_THREADS says.
                    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))

            store = None if "RANK" in os.environ else dist.HashStore()
            # Both of NCCL's watchdogs would end a rank with a stack that names nobody, after 600 and 480 s.
            patience = max(_PATIENCE, timedelta(seconds=2 * hang_after))
            os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(round(patience.total_seconds())))
            # gloo beside NCCL: objects of the host (checkpoint plans, metrics) need no trip over the GPU.
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
            stack.callback(dist.destroy_process_group)
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
            stack.callback(parallel_state.destroy_model_parallel)

            # One that does nothing: there is no dropout, so nothing draws while training. The others set generators of
            # their own around attention under tensor parallelism, and a CUDA graph knows only torch's.
            initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
            torch.manual_seed(seed)
            model_parallel_cuda_manual_seed(seed)
            dtype = torch.bfloat16 if cuda else torch.float32
            deterministic = deterministic and cuda
            split = tensor_parallel, weight_shards
            return cls(device, dtype, rank, world_size, *split, seed, deterministic, stack.pop_all())

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dp_rank(self) -> int:
        """This process's place among the `dp_size` that read different packs."""
        return int(parallel_state.get_data_parallel_rank())

    @property
    def dp_size(self) -> int:
        return self.world_size // self.tensor_parallel

    @property
    def tp_rank(self) -> int:
        """This process's place among the `tensor_parallel` that share a model."""
        return self.rank % self.tensor_parallel

    def shutdown(self) -> None:
        """Leave the job and undo the emulation. A second call does nothing."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
