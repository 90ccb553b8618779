"""Master weights in two parts, as a GPU has them: the bfloat16 weight and a 16-bit remainder."""

import torch
from torch import Tensor


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into the nearest bfloat16 weight and the int16 remainder: added as integers, they are the master.

    Transformer Engine's FusedAdam stores them so (store_param_remainders).
    """
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """Join what `split` split."""
    return ((weight.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)
