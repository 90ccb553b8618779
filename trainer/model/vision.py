"""The vision tower of Qwen2.5-VL: patches in window order in, visual tokens out.

The loader has put the patches in window order (see VisionBatch), so nothing is permuted here: most blocks attend within
windows, a few within whole images, and both are segments of the same sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from trainer.data.batch import VisionBatch
from trainer.model.attention import segment_attention
from trainer.model.config import VisionConfig
from trainer.model.rope import rotary_2d, rotate

NORM_EPS = 1e-6  # fixed in Qwen2.5-VL, no configuration names it


class Segments(NamedTuple):
    ends: Tensor  # cumulative lengths, as segment_attention's cu_seqlens
    longest: int  # patches


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        with torch.device(device):
            self.patch_embed = PatchEmbed(config)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
            self.merger = Merger(config)
        self.to(dtype)

    def forward(self, images: VisionBatch) -> Tensor:
        """Visual tokens [M, out_hidden_size], in window order; M = P / merge_size^2."""
        x = self.patch_embed(images.patches)
        rotary = rotary_2d(images.positions, self.config.head_dim)
        windows = Segments(images.cu_windows, (self.config.window_size // self.config.patch_size) ** 2)
        whole = Segments(images.cu_images, len(images.patches))
        for index, block in enumerate(self.blocks):
            x = block(x, whole if index in self.config.full_attention_blocks else windows, rotary)
        tokens: Tensor = self.merger(x)
        return tokens


class PatchEmbed(nn.Module):
    """Pixels to hidden states: transformers' Conv3d over two frames, as a matrix over one.

    Both frames of an image are the same picture, so W0 x + W1 x = (W0 + W1) x with half the pixels. The parameter keeps
    both halves, so that checkpoints convert bit for bit.
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
        """[P, channels * area] uint8 -> [P, hidden]."""
        pixels = ((patches - self.mean) / self.std).to(self.weight.dtype)
        return linear(pixels, self.weight.unflatten(1, self.frames).sum(2).flatten(1))


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.norm2 = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.attn = Attention(config)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, segments: Segments, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), segments, rotary)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = (3, config.num_heads, config.head_dim)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, segments: Segments, rotary: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self.qkv(x).unflatten(1, self.heads).unbind(1)  # each [P, heads, head_dim]
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        out = segment_attention(query, key, value, segments.ends, longest=segments.longest, causal=False)
        return self.proj(out.flatten(1))


class GatedMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(silu(gate) * up)


class Merger(nn.Module):
    """merge_size x merge_size neighbouring patches to one visual token of the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.merge_size**2 * config.hidden_size
        self.norm = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.fc1 = nn.Linear(self.width, self.width)
        self.fc2 = nn.Linear(self.width, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(self.norm(x).view(-1, self.width))))
