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
from trainer.models.qwen2_5.vision_layers import VisionLayers


class VisionTower(nn.Module):
    """Patches to visual tokens. `recomputed` blocks keep only their input and run again in the backward pass."""

    def __init__(
        self, config: VisionConfig, layers: VisionLayers, device: torch.device, dtype: torch.dtype, recomputed: int = 0
    ) -> None:
        super().__init__()
        self.config, self._layers = config, layers
        # Blocks that attend within windows are recomputed first: they take less time.
        by_work = sorted(range(config.depth), key=lambda index: index in config.full_attention_blocks)
        self._recomputed = by_work[:recomputed]
        with torch.device(device):
            self.patch_embed = PatchEmbed(config)
            self.blocks = nn.ModuleList(Block(config, layers) for _ in range(config.depth))
            self.merger = Merger(config, layers)
        self.to(dtype)

    def forward(self, images: VisionBatch) -> Tensor:
        """Return visual tokens [M, out_hidden_size] in window order; M = P / merge_size^2."""
        x = self.patch_embed(images.patches)
        rotary = rotary_2d(images.positions, self.config.head_dim)
        with self._layers.precision():
            for index, block in enumerate(self.blocks):
                if index in self.config.full_attention_blocks:
                    arguments = rotary, images.cu_images, len(x)
                else:
                    arguments = rotary, images.cu_windows, self.config.longest_window
                recompute = index in self._recomputed and x.requires_grad
                x = self._checkpointed(block, x, *arguments) if recompute else block(x, *arguments)
            tokens: Tensor = self.merger(x)
        return tokens

    def _checkpointed(self, block: nn.Module, x: Tensor, *arguments: Any) -> Tensor:
        def run(x: Tensor) -> Tensor:
            with self._layers.precision():
                out: Tensor = block(x, *arguments)
            return out

        # Reentrant: the first pass runs without gradients, so it casts nothing for a backward pass that casts anew.
        # preserve_rng_state: nothing is random, and a CUDA graph cannot read the generator's state.
        return checkpoint(run, x, use_reentrant=True, preserve_rng_state=False)


class PatchEmbed(nn.Module):
    """Pixels to hidden states: transformers' Conv3d over two frames, as a matrix over one.

    Both frames of an image are the same picture, so W0 x + W1 x = (W0 + W1) x with half the pixels. The parameter keeps
    both halves, so that checkpoints convert bit for bit. Never in fp8, which would need rows of a multiple of 16.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        area = config.patch_size**2
        self.frames = (config.channels, config.temporal_patch_size, area)
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.channels * config.temporal_patch_size * area))
        # transformers' (level / 255 - mean) / std. No buffers: those would be cast to bfloat16 with the parameters.
        self.mean = 255 * torch.tensor(config.image_mean).repeat_interleave(area)
        self.std = 255 * torch.tensor(config.image_std).repeat_interleave(area)

    def forward(self, patches: Tensor) -> Tensor:
        """[P, channels * area] uint8 -> [P, H]."""
        pixels = ((patches - self.mean) / self.std).to(self.weight.dtype)
        return linear(pixels, self.weight.unflatten(1, self.frames).sum(2).flatten(1))


class Block(nn.Module):
    def __init__(self, config: VisionConfig, layers: VisionLayers) -> None:
        super().__init__()
        self.norm1 = layers.norm(config.hidden_size)
        self.norm2 = layers.norm(config.hidden_size)
        self.attn = Attention(config, layers)
        self.mlp = GatedMLP(config, layers)

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
    """x + MLP of norm(x). See VisionConfig.padded_intermediate_size; gate_up has the gate's rows, then up's."""

    def __init__(self, config: VisionConfig, layers: VisionLayers) -> None:
        super().__init__()
        width, self.used, self._layers = config.padded_intermediate_size, config.intermediate_size, layers
        self.gate_up = layers.linear(config.hidden_size, 2 * width)
        self.down = layers.linear(width, config.hidden_size)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        out, x = self._layers.branch(x, norm, self.gate_up, self._layers.swiglu, self.down)
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
