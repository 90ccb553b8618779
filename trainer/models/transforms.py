"""How several Hugging Face tensors become one tensor of megatron.core, and back: bit for bit.

torch is imported when a transform is applied, not before: the tables of names need none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.models.config import ModelConfig, VisionConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Transform:
    """A pair of inverse functions. Both raise RuntimeError if a shape does not fit the configuration."""

    to_megatron: Callable[[Sequence["Tensor"], ModelConfig], "Tensor"]
    to_hf: Callable[["Tensor", ModelConfig], Sequence["Tensor"]]


def _concatenate(parts: Sequence["Tensor"], dim: int = 0) -> "Tensor":
    import torch

    return torch.cat(list(parts), dim)


def _interleave(qkv: Sequence["Tensor"], config: ModelConfig) -> "Tensor":
    """q [n D, ...], k [g D, ...], v [g D, ...] -> [(n + 2g) D, ...]: for each group its query heads, its k, its v.

    n query heads, g key/value groups: a tensor-parallel rank's rows are whole groups.
    """
    rows = _group_rows(config)
    groups = [x.unflatten(0, (config.num_kv_heads, size)) for x, size in zip(qkv, rows, strict=True)]
    return _concatenate(groups, 1).flatten(0, 1)


def _separate(fused: "Tensor", config: ModelConfig) -> Sequence["Tensor"]:
    rows = _group_rows(config)
    groups = fused.unflatten(0, (config.num_kv_heads, sum(rows)))
    return [x.flatten(0, 1) for x in groups.split(rows, dim=1)]


def _group_rows(config: ModelConfig) -> list[int]:
    """Return the rows of q, k and v in one key/value group."""
    return [config.num_heads // config.num_kv_heads * config.head_dim, config.head_dim, config.head_dim]


def _patch_shape(config: ModelConfig) -> tuple[int, int, int, int]:
    """Return [channels, frames, height, width] of Conv3d's kernel: a whole patch, so the convolution is a matrix."""
    vision = _vision(config)
    return vision.channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size


def _pad(part: "Tensor", config: ModelConfig, dim: int) -> "Tensor":
    """Add the zero neurons of VisionConfig.padded_intermediate_size along `dim`."""
    vision, added = _vision(config), list(part.shape)
    added[dim] = vision.padded_intermediate_size - vision.intermediate_size
    return _concatenate([part, part.new_zeros(added)], dim)


def _unpad(part: "Tensor", config: ModelConfig, dim: int) -> "Tensor":
    return part.narrow(dim, 0, _vision(config).intermediate_size)


def _vision(config: ModelConfig) -> VisionConfig:
    assert config.vision is not None
    return config.vision


COPY = Transform(lambda parts, config: parts[0], lambda whole, config: [whole])
QKV = Transform(_interleave, _separate)
# Two matrices of equal size, one below the other: the gate's rows, then the up projection's.
GATE_UP = Transform(lambda parts, config: _concatenate(parts), lambda whole, config: whole.chunk(2))
VISION_GATE_UP = Transform(
    lambda parts, config: _concatenate([_pad(part, config, 0) for part in parts]),
    lambda whole, config: [_unpad(part, config, 0) for part in whole.chunk(2)],
)
VISION_DOWN = Transform(
    lambda parts, config: _pad(parts[0], config, 1), lambda whole, config: [_unpad(whole, config, 1)]
)
PATCH_EMBED = Transform(
    lambda parts, config: parts[0].flatten(1), lambda whole, config: [whole.unflatten(1, _patch_shape(config))]
)
