"""The vision tower of Qwen2.5-VL: patches in window order in, visual tokens out.

The loader has put the patches in window order (see VisionBatch), so nothing is permuted here: most blocks attend within
windows, a few within whole images, and both are segments of the same sequence.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear
from torch.utils.checkpoint import checkpoint

from trainer.data.batch import VisionBatch
from trainer.kernels.rope import Rotary, rotary_2d
from trainer.models.config import VisionConfig
from trainer.models.qwen2_5.config import WindowedVisionConfig
from trainer.models.qwen2_5.vision_layers import VisionLayers


class Tower(nn.Module):
    """What the vision towers of all families share: their blocks can be recomputed in the backward pass."""

    def __init__(self, layers: VisionLayers) -> None:
        super().__init__()
        self._layers = layers

    def _run(self, block: nn.Module, x: Tensor, *arguments: Any, recompute: bool) -> Tensor:
        """Return the block's output. `recompute`: keep only x, and run the block again in the backward pass."""
        if not (recompute and x.requires_grad):
            out: Tensor = block(x, *arguments)
            return out

        def run(x: Tensor) -> Tensor:
            with self._layers.precision():  # the backward pass is outside of forward's
                out: Tensor = block(x, *arguments)
            return out

        # Reentrant: the first pass runs without gradients, so it casts nothing for a backward pass that casts anew.
        # preserve_rng_state: nothing is random, and a CUDA graph cannot read the generator's state.
        return checkpoint(run, x, use_reentrant=True, preserve_rng_state=False)


class VisionTower(Tower):
    """Patches to visual tokens. The first `recomputed` blocks are recomputed in the backward pass."""

    def __init__(
        self,
        config: WindowedVisionConfig,
        layers: VisionLayers,
        device: torch.device,
        dtype: torch.dtype,
        recomputed: int = 0,
    ) -> None:
        super().__init__(layers)
        self.config = config
        # Blocks that attend within windows are recomputed first: they take less time.
        by_work = sorted(range(config.depth), key=lambda index: index in config.full_attention_blocks)
        self._recomputed = by_work[:recomputed]
        with torch.device(device):
            self.patch_embed = PatchEmbed(config)
            self.blocks = nn.ModuleList(Block(config, layers, GatedMLP(config, layers)) for _ in range(config.depth))
            self.merger = Merger(config, layers)
        self.to(dtype)

    def forward(self, images: VisionBatch) -> Tensor:
        """Return visual tokens [M, out_hidden_size] in window order; M = P / merge_size^2."""
        x = self.patch_embed(images.patches)
        rotary = rotary_2d(images.per_patch["positions"], self.config.head_dim)
        with self._layers.precision():
            for index, block in enumerate(self.blocks):
                if index in self.config.full_attention_blocks:
                    arguments = rotary, images.segments["images"], len(x)
                else:
                    arguments = rotary, images.segments["windows"], self.config.longest_window
                x = self._run(block, x, *arguments, recompute=index in self._recomputed)
            tokens: Tensor = self.merger(x)
        return tokens


class PatchEmbed(nn.Module):
    """Pixels to hidden states: transformers' Conv3d over two frames, as a matrix over one.

    Both frames of an image are the same picture, so W0 x + W1 x = (W0 + W1) x with half the pixels. The parameter keeps
    both halves, so that checkpoints convert bit for bit. Never in fp8, which would need rows of a multiple of 16.
    """

    def __init__(self, config: VisionConfig, bias: bool = False) -> None:
        super().__init__()
        area = config.patch_size**2
        self.frames = (config.channels, config.temporal_patch_size, area)
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.channels * config.temporal_patch_size * area))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if bias else None
        # transformers' (level / 255 - mean) / std. No buffers: those would be cast to bfloat16 with the parameters.
        self.mean = 255 * torch.tensor(config.image_mean).repeat_interleave(area)
        self.std = 255 * torch.tensor(config.image_std).repeat_interleave(area)

    def forward(self, patches: Tensor) -> Tensor:
        """[P, channels * area] uint8 -> [P, H]."""
        pixels = ((patches - self.mean) / self.std).to(self.weight.dtype)
        return linear(pixels, self.weight.unflatten(1, self.frames).sum(2).flatten(1), self.bias)


class Block(nn.Module):
    """Attention, then `mlp`, each of them the whole residual branch."""

    def __init__(self, config: VisionConfig, layers: VisionLayers, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = layers.norm(config.hidden_size)
        self.norm2 = layers.norm(config.hidden_size)
        self.attn = Attention(config, layers)
        self.mlp = mlp

    def forward(self, x: Tensor, rotary: Rotary, cu_seqlens: Tensor, longest: int) -> Tensor:
        x = self.attn(x, self.norm1, rotary, cu_seqlens, longest)
        out: Tensor = self.mlp(x, self.norm2)
        return out


class Attention(nn.Module):
    """x + attention of norm(x)."""

    def __init__(self, config: VisionConfig, layers: VisionLayers) -> None:
        super().__init__()
        self.heads, self._layers = (3, config.num_heads, config.head_dim), layers
        self.qkv = layers.linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = layers.linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, norm: nn.Module, rotary: Rotary, cu_seqlens: Tensor, longest: int) -> Tensor:
        qkv, x = self._layers.branch(x, norm, self.qkv)
        attended = self._layers.attend(qkv.unflatten(1, self.heads), rotary, cu_seqlens, longest)
        return x + self.proj(attended.flatten(1))


class GatedMLP(nn.Module):
    """x + MLP of norm(x). gate_up has the gate's rows, then up's; see WindowedVisionConfig.padded_intermediate_size."""

    def __init__(self, config: WindowedVisionConfig, layers: VisionLayers) -> None:
        super().__init__()
        width, self.used, self._layers = config.padded_intermediate_size, config.intermediate_size, layers
        self.gate_up = layers.linear(config.hidden_size, 2 * width)
        self.down = layers.linear(width, config.hidden_size)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        out, x = self._layers.branch(x, norm, self.gate_up, self._layers.activation, self.down)
        return x + out

    def clear_padding(self) -> None:
        """Call it after random weights were drawn."""
        self.gate_up.get_parameter("weight").unflatten(0, (2, -1))[:, self.used :] = 0
        self.down.get_parameter("weight")[:, self.used :] = 0


class Merger(nn.Module):
    """merge_size x merge_size neighbouring patches to one visual token of the language model's width."""

    def __init__(self, config: VisionConfig, layers: VisionLayers) -> None:
        super().__init__()
        self.width = config.merge_size**2 * config.hidden_size
        self.norm = layers.norm(config.hidden_size)
        self.fc1 = layers.linear(self.width, self.width)
        self.fc2 = layers.linear(self.width, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(self.norm(x).view(-1, self.width))))
