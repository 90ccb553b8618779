"""The vision tower of Qwen3-VL: patches in, visual tokens out, and more of them from its middle (deepstack)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu

from trainer.data.batch import VisionBatch
from trainer.kernels.rope import rotary_2d
from trainer.models.config import VisionConfig
from trainer.models.qwen2_5.vision import Block, PatchEmbed, Tower
from trainer.models.qwen2_5.vision_layers import VisionLayers
from trainer.models.qwen3_vl.config import DeepstackVisionConfig


class VisionTower(Tower):
    """Every block attends within whole images. The first `recomputed` blocks are recomputed in the backward pass."""

    def __init__(
        self,
        config: DeepstackVisionConfig,
        layers: VisionLayers,
        device: torch.device,
        dtype: torch.dtype,
        recomputed: int = 0,
    ) -> None:
        super().__init__(layers)
        self.config, self._recomputed = config, recomputed
        with torch.device(device):
            self.patch_embed = PatchEmbed(config, bias=True)
            self.position_embed = PositionEmbed(config)
            self.blocks = nn.ModuleList(Block(config, layers, MLP(config, layers)) for _ in range(config.depth))
            self.merger = Mergers(config, layers)
        self.to(dtype)

    def forward(self, images: VisionBatch) -> tuple[Tensor, list[Tensor]]:
        """Return visual tokens [M, out_hidden_size], and one more such tensor for each deepstack block.

        M = P / merge_size^2.
        """
        x, deepstack = self.patch_embed(images.patches) + self.position_embed(images), []
        rotary = rotary_2d(images.per_patch["positions"], self.config.head_dim)
        with self._layers.precision():
            for index, block in enumerate(self.blocks):
                arguments = rotary, images.segments["images"], len(x)
                x = self._run(block, x, *arguments, recompute=index < self._recomputed)
                if index in self.config.deepstack_blocks:
                    deepstack.append(self.merger.deepstack[self.config.deepstack_blocks.index(index)](x))
            tokens: Tensor = self.merger(x)
        return tokens, deepstack


class PositionEmbed(nn.Module):
    """Learned positions of a square grid, interpolated to the place of each patch (see LearnedPositions)."""

    def __init__(self, config: DeepstackVisionConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.position_side**2, config.hidden_size))

    def forward(self, images: VisionBatch) -> Tensor:
        """[P, H]; summed in float32, as transformers does."""
        neighbours = embedding(images.per_patch["position_index"], self.weight)  # [P, 4, H]
        weighted = neighbours * images.per_patch["position_weight"][:, :, None]
        return weighted.sum(1).to(self.weight.dtype)


class MLP(nn.Module):
    """x + MLP of norm(x), without a gate."""

    def __init__(self, config: VisionConfig, layers: VisionLayers) -> None:
        super().__init__()
        self._layers = layers
        self.fc1 = layers.linear(config.hidden_size, config.intermediate_size)
        self.fc2 = layers.linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        out, x = self._layers.branch(x, norm, self.fc1, self._layers.activation, self.fc2)
        return x + out


class Merger(nn.Module):
    """merge_size x merge_size neighbouring patches to one visual token of the language model's width.

    `norm_width`: channels that are normalised together, a patch's or all that are merged.
    """

    def __init__(self, config: VisionConfig, layers: VisionLayers, norm_width: int) -> None:
        super().__init__()
        self.width, self.norm_width = config.merge_size**2 * config.hidden_size, norm_width
        self.norm = layers.norm(norm_width)
        self.fc1 = layers.linear(self.width, self.width)
        self.fc2 = layers.linear(self.width, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x.view(-1, self.norm_width)).view(-1, self.width)
        out: Tensor = self.fc2(gelu(self.fc1(normed)))
        return out


class Mergers(Merger):
    """The last block's merger, and those of the deepstack blocks: one part of the model, to train or to freeze."""

    def __init__(self, config: DeepstackVisionConfig, layers: VisionLayers) -> None:
        super().__init__(config, layers, config.hidden_size)
        self.deepstack = nn.ModuleList(Merger(config, layers, self.width) for _ in config.deepstack_blocks)
