"""Costs of Qwen2.5-VL: those of its decoder, and of the vision tower."""

from typing import TYPE_CHECKING

from trainer.data.source import PackCost
from trainer.models.config import Compute, ModelConfig
from trainer.models.costs import Costs
from trainer.models.qwen2_5.config import vision_of

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.batch import Batch, VisionBatch


class VisionLanguageCosts(Costs):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.vision = vision_of(model)

    @property
    def vision_parameters(self) -> int:
        h, f, unit = self.vision.hidden_size, self.vision.intermediate_size, self.vision.merge_size**2
        block = 4 * h * h + 4 * h + 3 * h * f + 2 * f + h + 2 * h
        embedding = h * self.vision.channels * self.vision.temporal_patch_size * self.vision.patch_size**2
        merger = h + (unit * h) ** 2 + unit * h + (unit * h + 1) * self.vision.out_hidden_size
        return embedding + self.vision.depth * block + merger

    @property
    def patch_flops(self) -> int:
        """Embedding, blocks (q, k, v; output; gate, up, down) and merger, which works on merge_size^2 patches at once.

        Both frames of an image are the same, so the embedding reads one.
        """
        h, unit = self.vision.hidden_size, self.vision.merge_size**2
        embedding = self.vision.channels * self.vision.patch_size**2 * h
        block = 4 * h * h + 3 * h * self.vision.intermediate_size
        merger = (unit * h) ** 2 + unit * h * self.vision.out_hidden_size
        return 2 * (embedding + self.vision.depth * block) + 2 * merger // unit

    @property
    def pack_cost(self) -> PackCost:
        """The decoder's, and patches, whose attention is taken as within windows: full attention adds 5 % for a
        784 x 784 picture.
        """
        window = self.vision.longest_window * 4 * self.vision.hidden_size * self.vision.depth
        return PackCost(pair=super().pack_cost.pair, patch=self.patch_flops + window)

    def forward_flops(self, batch: "Batch") -> int:
        flops = super().forward_flops(batch)
        return flops + (0 if batch.vision is None else self._vision_flops(batch.vision, batch.real_patches))

    def _vision_flops(self, images: "VisionBatch", patches: int) -> int:
        """Return the tower's FLOPs on the first `patches`; all others are padding."""
        full = len(self.vision.full_attention_blocks)
        attended = full * squares(images.segments["images"], patches)
        attended += (self.vision.depth - full) * squares(images.segments["windows"], patches)
        return patches * self.patch_flops + attended * 2 * 2 * self.vision.hidden_size

    def patch_bytes(self, compute: Compute) -> int:
        """See Costs.layer_bytes.

        Attention in windows keeps no output: in fp8 the product behind it has it in 8 bits.
        """
        h, f = self.vision.hidden_size, self.vision.padded_intermediate_size
        recomputed = compute.recomputed_blocks
        inputs = (2 * h + h + f) * (1 if compute.fp8 else 2)
        block = 2 * (2 * h + 3 * h + 2 * f) + inputs
        merger = 2 * 4 * h  # the norm's input and output, both sides of gelu
        embedding = 2 * self.vision.channels * self.vision.patch_size**2
        kept = self.vision.depth - recomputed + (recomputed > 0)
        return kept * block + recomputed * 2 * h + merger + embedding


def squares(cumulative: "Tensor", patches: int) -> int:
    """Return the sum of squared segment lengths; segments behind the first `patches` are padding."""
    lengths = cumulative.clamp(max=patches).diff().long()
    return int((lengths * lengths).sum())
