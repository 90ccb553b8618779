"""How several Hugging Face tensors become one tensor of megatron.core, and back: bit for bit.

torch is imported when a transform is applied, not before: the tables of names need none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Transform:
    """A pair of inverse functions. Both raise RuntimeError if a shape does not fit the configuration."""

    to_megatron: Callable[[Sequence["Tensor"], ModelConfig], "Tensor"]
    to_hf: Callable[["Tensor", ModelConfig], Sequence["Tensor"]]


def concatenate(parts: Sequence["Tensor"], dim: int = 0) -> "Tensor":
    """Return torch.cat(parts, dim)."""
    import torch

    return torch.cat(list(parts), dim)


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


COPY = Transform(lambda parts, config: parts[0], lambda whole, config: [whole])
QKV = Transform(_interleave, _separate)
# Two matrices of equal size, one below the other: the gate's rows, then the up projection's.
GATE_UP = Transform(lambda parts, config: concatenate(parts), lambda whole, config: whole.chunk(2))
PATCH_EMBED = Transform(
    lambda parts, config: parts[0].flatten(1), lambda whole, config: [whole.unflatten(1, _patch_shape(config))]
)
