"""How the tensors that Hugging Face keeps apart become one tensor of megatron.core, and back: bit for bit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.models.qwen2_5.config import ModelConfig


@dataclass(frozen=True)
class Transform:
    """A pair of inverse functions. Both raise RuntimeError if a shape is not the config's."""

    to_megatron: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    to_hf: Callable[[Tensor, ModelConfig], Sequence[Tensor]]


def _interleave(qkv: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """q [n d, ...], k [g d, ...], v [g d, ...] -> [(n + 2g) d, ...]: each key/value group's query heads, its k, its v.

    n heads of d channels, g groups. So a tensor parallel rank's share of rows is whole groups.
    """
    rows = _group_rows(config)
    groups = [x.unflatten(0, (config.num_kv_heads, size)) for x, size in zip(qkv, rows, strict=True)]
    return torch.cat(groups, dim=1).flatten(0, 1)


def _separate(fused: Tensor, config: ModelConfig) -> Sequence[Tensor]:
    rows = _group_rows(config)
    groups = fused.unflatten(0, (config.num_kv_heads, sum(rows)))
    return [x.flatten(0, 1) for x in groups.split(rows, dim=1)]


def _group_rows(config: ModelConfig) -> list[int]:
    """Rows of q, k and v in one key/value group."""
    return [config.num_heads // config.num_kv_heads * config.head_dim, config.head_dim, config.head_dim]


def _patch_shape(config: ModelConfig) -> tuple[int, int, int, int]:
    """[channels, frames, height, width] of Conv3d's kernel: a whole patch, so the convolution is a matrix."""
    vision = config.vision
    assert vision is not None
    return vision.channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size


def _pad(part: Tensor, config: ModelConfig, dim: int) -> Tensor:
    """Neurons of the vision tower's gated MLP, along `dim`, with those that the trainer adds: zeros."""
    assert config.vision is not None
    added = list(part.shape)
    added[dim] = config.vision.padded_intermediate_size - config.vision.intermediate_size
    return torch.cat([part, part.new_zeros(added)], dim)


def _cut(part: Tensor, config: ModelConfig, dim: int) -> Tensor:
    assert config.vision is not None
    return part.narrow(dim, 0, config.vision.intermediate_size)


COPY = Transform(lambda parts, config: parts[0], lambda whole, config: [whole])
QKV = Transform(_interleave, _separate)
# Two matrices of equal size, one below the other: the gate's rows, then the up projection's.
GATE_UP = Transform(lambda parts, config: torch.cat(list(parts)), lambda whole, config: whole.chunk(2))
VISION_GATE_UP = Transform(
    lambda parts, config: torch.cat([_pad(part, config, 0) for part in parts]),
    lambda whole, config: [_cut(part, config, 0) for part in whole.chunk(2)],
)
VISION_DOWN = Transform(lambda parts, config: _pad(parts[0], config, 1), lambda whole, config: [_cut(whole, config, 1)])
PATCH_EMBED = Transform(
    lambda parts, config: parts[0].flatten(1), lambda whole, config: [whole.unflatten(1, _patch_shape(config))]
)
