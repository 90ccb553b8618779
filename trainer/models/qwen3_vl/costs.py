"""Costs of Qwen3-VL: those of its decoder, and of the vision tower with its mergers."""

from typing import TYPE_CHECKING

from trainer.data.source import PackCost
from trainer.models.config import Compute, ModelConfig
from trainer.models.costs import Costs
from trainer.models.qwen2_5.costs import squares
from trainer.models.qwen3_vl.config import vision_of

if TYPE_CHECKING:
    from trainer.data.batch import Batch

# Patches of a picture where its size is not known, 768 x 768 pixels: attention within it grows with the square.
PICTURE = 2304


class DeepstackCosts(Costs):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.vision = vision_of(model)
        self.mergers = 1 + len(self.vision.deepstack_blocks)

    @property
    def vision_parameters(self) -> int:
        h, f, merged, out = self.vision.hidden_size, self.vision.intermediate_size, self._merged, self._out
        block = 4 * h * h + 4 * h + 2 * h * f + f + h + 2 * 2 * h
        pixels = self.vision.channels * self.vision.temporal_patch_size * self.vision.patch_size**2
        embedding = (pixels + 1) * h + self.vision.position_side**2 * h
        merger = (merged + 1) * merged + (merged + 1) * out
        norms = 2 * h + (self.mergers - 1) * 2 * merged
        return embedding + self.vision.depth * block + self.mergers * merger + norms

    @property
    def patch_flops(self) -> int:
        """Embedding, blocks (q, k, v; output; up, down) and mergers, which work on merge_size^2 patches at once.

        Both frames of an image are the same, so the embedding reads one.
        """
        h = self.vision.hidden_size
        embedding = self.vision.channels * self.vision.patch_size**2 * h
        block = 4 * h * h + 2 * h * self.vision.intermediate_size
        merger = self._merged**2 + self._merged * self._out
        return 2 * (embedding + self.vision.depth * block) + 2 * self.mergers * merger // self.vision.merge_size**2

    @property
    def picture_flops(self) -> int:
        """Within pictures of PICTURE patches."""
        return PICTURE * self._square_flops

    @property
    def pack_cost(self) -> PackCost:
        return PackCost(pair=super().pack_cost.pair, patch=self.patch_flops + self.picture_flops)

    def forward_flops(self, batch: "Batch") -> int:
        flops = super().forward_flops(batch)
        if batch.vision is None:
            return flops
        attended = squares(batch.vision.segments["images"], batch.real_patches)
        return flops + batch.real_patches * self.patch_flops + attended * self._square_flops

    def patch_bytes(self, compute: Compute) -> int:
        """See Costs.layer_bytes."""
        h, f, recomputed = self.vision.hidden_size, self.vision.intermediate_size, compute.recomputed_blocks
        # Both norms' inputs; query, key and value; attention's output; GELU's input.
        block = 2 * (2 * h + 3 * h + h + f)
        # Inputs of the matrix products: both norms' outputs, GELU's output; in fp8 attention's output once more.
        block += (2 * h + h + f) if compute.fp8 else 2 * (2 * h + f)
        merger = 2 * 4 * h  # the norm's input and output, both sides of gelu
        deepstack = (self.mergers - 1) * (merger + 2 * 2 * self._out // self.vision.merge_size**2)
        embedding = 2 * self.vision.channels * self.vision.patch_size**2
        kept = self.vision.depth - recomputed + (recomputed > 0)
        return kept * block + recomputed * 2 * h + merger + deepstack + embedding

    @property
    def _square_flops(self) -> int:
        """One patch attending to one patch, forward: scores and output, over all heads and blocks."""
        return 2 * 2 * self.vision.hidden_size * self.vision.depth

    @property
    def _merged(self) -> int:
        """Channels of the patches that become one visual token."""
        return self.vision.merge_size**2 * self.vision.hidden_size

    @property
    def _out(self) -> int:
        return self.vision.out_hidden_size
