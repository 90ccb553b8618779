"""How several Hugging Face tensors become one tensor of megatron.core, and back: bit for bit.

torch is imported when a transform is applied, not before: the tables of names need none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from trainer.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """A pair of inverse functions, which raise RuntimeError if a shape does not fit the configuration, and the shape
    of the megatron tensor. (Without values, on the meta device, torch.cat would import torch's compiler, 2.4 s.)
    """

    to_megatron: Callable[[Sequence["Tensor"], ModelConfig], "Tensor"]
    to_hf: Callable[["Tensor", ModelConfig], Sequence["Tensor"]]
    shape: Callable[[Sequence[Shape], ModelConfig], Shape]


def concatenate(parts: Sequence["Tensor"], dim: int = 0) -> "Tensor":
    """Return torch.cat(parts, dim)."""
    import torch

    return torch.cat(list(parts), dim)


def one_below_the_other(parts: Sequence["Tensor"]) -> "Tensor":
    """Return torch.cat(parts), without a copy if they lie so in memory already, as conversion reads them."""
    first, rows = parts[0], sum(len(part) for part in parts)
    end = first.data_ptr()
    for part in parts:
        same = part.dtype == first.dtype and part.shape[1:] == first.shape[1:] and part.is_contiguous()
        if part.data_ptr() != end or not same:
            return concatenate(parts)
        end += part.nbytes
    if end > first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():
        return concatenate(parts)  # two allocations that happen to touch
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _interleave(qkv: Sequence["Tensor"], config: ModelConfig) -> "Tensor":
    """q [n D, ...], k [g D, ...], v [g D, ...] -> [(n + 2g) D, ...]: for each group its query heads, its k, its v.

    n query heads, g key/value groups: a tensor-parallel rank's rows are whole groups.
    """
    rows = _group_rows(config)
    groups = [x.unflatten(0, (config.num_kv_heads, size)) for x, size in zip(qkv, rows, strict=True)]
    return concatenate(groups, 1).flatten(0, 1)


def _separate(fused: "Tensor", config: ModelConfig) -> Sequence["Tensor"]:
    rows = _group_rows(config)
    groups = fused.unflatten(0, (config.num_kv_heads, sum(rows)))
    return [x.flatten(0, 1) for x in groups.split(rows, dim=1)]


def _group_rows(config: ModelConfig) -> list[int]:
    """Return the rows of q, k and v in one key/value group."""
    return [config.num_heads // config.num_kv_heads * config.head_dim, config.head_dim, config.head_dim]


def _patch_shape(config: ModelConfig) -> tuple[int, int, int, int]:
    """Return [channels, frames, height, width] of Conv3d's kernel: a whole patch, so the convolution is a matrix."""
    vision = config.vision
    assert vision is not None
    return vision.channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size


def _all_rows(shapes: Sequence[Shape], config: ModelConfig) -> Shape:
    """Return the shape of matrices one below the other."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


COPY = Transform(
    lambda parts, config: parts[0],
    lambda whole, config: [whole],
    lambda shapes, config: shapes[0],
)
QKV = Transform(_interleave, _separate, _all_rows)
# Two matrices of equal size, one below the other: the gate's rows, then the up projection's.
GATE_UP = Transform(
    lambda parts, config: one_below_the_other(parts),
    lambda whole, config: whole.chunk(2),
    _all_rows,
)
PATCH_EMBED = Transform(
    lambda parts, config: parts[0].flatten(1),
    lambda whole, config: [whole.unflatten(1, _patch_shape(config))],
    lambda shapes, config: (shapes[0][0], prod(shapes[0][1:])),
)
