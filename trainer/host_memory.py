"""Host memory for copies of what a GPU holds: checkpoints on their way to a disk, activations that wait."""

import psutil
import torch

_SPARE = 0.9  # share of the free host memory that a checkpoint's copy may take
_ACTIVATIONS = 0.25  # share of all host memory that activations may take


class PageLocked:
    """Host memory that a GPU copies to and from while it computes. For a CPU, plain memory."""

    def __init__(self, size: int, device: torch.device) -> None:
        # Registered, not allocated, by CUDA: torch's own pinned memory is rounded up to a power of two, 37 GB to 69.
        self.bytes = torch.empty(size, dtype=torch.uint8)
        self.locked = device.type == "cuda" and size > 0
        if self.locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0))

    def close(self) -> None:
        if self.locked:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
        self.locked, self.bytes = False, torch.empty(0, dtype=torch.uint8)


def host_room(ranks: int) -> int:
    """Bytes of host memory that each of the node's ranks may take for the copy of a checkpoint."""
    return int(psutil.virtual_memory().available * _SPARE / ranks)


def activation_room(ranks: int) -> int:
    """Bytes of host memory that each of the node's ranks may offload activations to. The same in every rank and run,
    as the layout that is planned with it has to be.
    """
    return int(psutil.virtual_memory().total * _ACTIVATIONS / ranks)
