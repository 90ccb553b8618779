"""The vision tower of Qwen2.5-VL: patches in window order in, visual tokens out.

The loader has put the patches in window order (see VisionBatch), so nothing is permuted here: most blocks attend within
windows, a few within whole images, and both are segments of the same sequence.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu
from torch.utils.checkpoint import checkpoint

from trainer.data.batch import VisionBatch
from trainer.model.attention import segment_attention
from trainer.model.config import VisionConfig
from trainer.model.rope import rotary_2d, rotate

NORM_EPS = 1e-6  # fixed in Qwen2.5-VL, no configuration names it


class Layers(NamedTuple):
    """What blocks are made of: of torch on a CPU, the reference; of vision_te.py on a GPU. Weights have one layout."""

    linear: Callable[[int, int], nn.Module]  # inputs, outputs; has weight and bias
    norm: Callable[[int], nn.Module]  # RMSNorm; has weight
    rotate: Callable[[Tensor, Tensor], Tensor]  # rope.rotate
    swiglu: Callable[[Tensor], Tensor]  # [P, 2 f] -> [P, f]: silu of the first half times the second
    precision: Callable[[], AbstractContextManager[None]]  # in which the blocks and the merger run


def reference_layers() -> Layers:
    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return silu(gate) * up

    return Layers(nn.Linear, lambda size: nn.RMSNorm(size, eps=NORM_EPS), rotate, swiglu, nullcontext)


class VisionTower(nn.Module):
    """`recomputed`: so many blocks, the first, keep nothing but their input, and run again in the backward pass."""

    def __init__(
        self, config: VisionConfig, layers: Layers, device: torch.device, dtype: torch.dtype, recomputed: int = 0
    ) -> None:
        super().__init__()
        self.config, self.precision, self._recomputed = config, layers.precision, recomputed
        with torch.device(device):
            self.patch_embed = PatchEmbed(config)
            self.blocks = nn.ModuleList(Block(config, layers) for _ in range(config.depth))
            self.merger = Merger(config, layers)
        self.to(dtype)

    def forward(self, images: VisionBatch) -> Tensor:
        """Visual tokens [M, out_hidden_size], in window order; M = P / merge_size^2."""
        x = self.patch_embed(images.patches)
        angles = rotary_2d(images.positions, self.config.head_dim)
        with self.precision():
            for index, block in enumerate(self.blocks):
                if index in self.config.full_attention_blocks:
                    facts = angles, images.cu_images, len(x)
                else:
                    facts = angles, images.cu_windows, self.config.longest_window
                x = self._again(block, x, *facts) if index < self._recomputed else block(x, *facts)
            tokens: Tensor = self.merger(x)
        return tokens

    def _again(self, block: nn.Module, *inputs: Tensor | int) -> Tensor:
        out: Tensor = checkpoint(
            block,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is random, and a CUDA graph cannot read the state
            context_fn=lambda: (nullcontext(), self.precision()),
        )
        return out


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
        """[P, channels * area] uint8 -> [P, hidden]."""
        pixels = ((patches - self.mean) / self.std).to(self.weight.dtype)
        return linear(pixels, self.weight.unflatten(1, self.frames).sum(2).flatten(1))


class Block(nn.Module):
    def __init__(self, config: VisionConfig, layers: Layers) -> None:
        super().__init__()
        self.norm1 = layers.norm(config.hidden_size)
        self.norm2 = layers.norm(config.hidden_size)
        self.attn = Attention(config, layers)
        self.mlp = GatedMLP(config, layers)

    def forward(self, x: Tensor, angles: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        x = x + self.attn(self.norm1(x), angles, cu_seqlens, longest)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, config: VisionConfig, layers: Layers) -> None:
        super().__init__()
        self.heads, self._rotate = (3, config.num_heads, config.head_dim), layers.rotate
        self.qkv = layers.linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = layers.linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, angles: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        query, key, value = self.qkv(x).unflatten(1, self.heads).unbind(1)  # each [P, heads, head_dim]
        query, key = self._rotate(query, angles), self._rotate(key, angles)
        # A copy of value: as a view it would keep query and key, as they were before, alive for the backward pass.
        out = segment_attention(query, key, value.contiguous(), cu_seqlens, longest, causal=False)
        return self.proj(out.flatten(1))


class GatedMLP(nn.Module):
    """See VisionConfig.padded_intermediate_size; gate_up has the gate's rows, then the up projection's."""

    def __init__(self, config: VisionConfig, layers: Layers) -> None:
        super().__init__()
        width, self.used, self._swiglu = config.padded_intermediate_size, config.intermediate_size, layers.swiglu
        self.gate_up = layers.linear(config.hidden_size, 2 * width)
        self.down = layers.linear(width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self._swiglu(self.gate_up(x)))

    def clear_padding(self) -> None:
        """Call it after random weights were drawn."""
        self.gate_up.weight.unflatten(0, (2, -1))[:, self.used :] = 0
        self.down.weight[:, self.used :] = 0


class Merger(nn.Module):
    """merge_size x merge_size neighbouring patches to one visual token of the language model's width."""

    def __init__(self, config: VisionConfig, layers: Layers) -> None:
        super().__init__()
        self.width = config.merge_size**2 * config.hidden_size
        self.norm = layers.norm(config.hidden_size)
        self.fc1 = layers.linear(self.width, self.width)
        self.fc2 = layers.linear(self.width, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(self.norm(x).view(-1, self.width))))
