"""The zero neurons that the vision tower's gated MLP has on our side: added on the way in, taken off on the way out."""

from typing import TYPE_CHECKING

from trainer.models.config import ModelConfig
from trainer.models.qwen2_5.config import vision_of
from trainer.models.transforms import Transform, concatenate

if TYPE_CHECKING:
    from torch import Tensor


def _pad(part: "Tensor", config: ModelConfig, dim: int) -> "Tensor":
    """Add the zero neurons of WindowedVisionConfig.padded_intermediate_size along `dim`."""
    vision, added = vision_of(config), list(part.shape)
    added[dim] = vision.padded_intermediate_size - vision.intermediate_size
    return concatenate([part, part.new_zeros(added)], dim)


def _unpad(part: "Tensor", config: ModelConfig, dim: int) -> "Tensor":
    return part.narrow(dim, 0, vision_of(config).intermediate_size)


VISION_GATE_UP = Transform(
    lambda parts, config: concatenate([_pad(part, config, 0) for part in parts]),
    lambda whole, config: [_unpad(part, config, 0) for part in whole.chunk(2)],
    lambda shapes, config: (2 * vision_of(config).padded_intermediate_size, *shapes[0][1:]),
)
VISION_DOWN = Transform(
    lambda parts, config: _pad(parts[0], config, 1),
    lambda whole, config: [_unpad(whole, config, 1)],
    lambda shapes, config: (shapes[0][0], vision_of(config).padded_intermediate_size),
)
