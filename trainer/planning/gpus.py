"""The GPUs that layouts are known for, and the links between them."""

from dataclasses import dataclass

from kanyun.errors import UserError

NODE = 8  # GPUs of a node, where nothing else is said
# Bytes/s of NCCL's rings ("bus bandwidth"): in a node; for each GPU of a node that takes part in a ring between nodes,
# by its own 400 Gb/s network card; and the most that a node reaches, of 8 x 50 GB/s. The last two: not measured here.
NVLINK, NETWORK, NETWORK_NODE = 300e9, 45e9, 350e9


@dataclass(frozen=True)
class GPU:
    name: str
    memory: float  # bytes, as CUDA reports it
    flops: float  # dense bfloat16 peak, FLOP/s, from NVIDIA's data sheets
    bandwidth: float  # bytes/s, likewise
    host_link: float  # bytes/s of a copy to the host over PCIe beside matrix products; one alone: 54.9e9 on an H100
    fp8: bool

    @property
    def usable(self) -> float:
        """Bytes left when CUDA, NCCL, cuBLAS and the allocator's rounding have taken theirs."""
        return self.memory * 0.95


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("H100", 85.0e9, 989e12, 3.35e12, 43e9, fp8=True),
        GPU("H200", 150.0e9, 989e12, 4.8e12, 43e9, fp8=True),
        # Its PCIe is of half the rate: not measured.
        GPU("A100", 85.0e9, 312e12, 2.04e12, 20e9, fp8=False),
    )
}


def find_gpu(device_name: str) -> GPU:
    """Return the GPU that CUDA calls `device_name`. Raises UserError if layouts are not known for it."""
    for name, gpu in GPUS.items():
        if name in device_name:
            return gpu
    raise UserError(f"the GPU is a {device_name!r}, and layouts are known for {', '.join(GPUS)}: use one of these")
