"""How the tensors that Hugging Face keeps apart become one tensor of megatron.core, and back: bit for bit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.model import ModelConfig


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


COPY = Transform(lambda parts, config: parts[0], lambda whole, config: [whole])
QKV = Transform(_interleave, _separate)
# Two matrices of equal size, one below the other: the gate's rows, then the up projection's.
GATE_UP = Transform(lambda parts, config: torch.cat(list(parts)), lambda whole, config: whole.chunk(2))
PATCH_EMBED = Transform(
    lambda parts, config: parts[0].flatten(1), lambda whole, config: [whole.unflatten(1, _patch_shape(config))]
)
