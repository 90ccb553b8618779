"""The vision tower's layers from Transformer Engine and Triton. Imported only where there is a GPU."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformer_engine.pytorch import DotProductAttention, Linear, RMSNorm
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
from transformer_engine.pytorch.ops import BasicLinear, Bias, MakeExtraOutput, Sequential, SwiGLU

from trainer.kernels.rope import Rotary
from trainer.kernels.segment_flash import segment_flash
from trainer.kernels.window_attention import LARGEST, window_attention
from trainer.models.config import VisionConfig
from trainer.models.qwen2_5.vision_layers import NORM_EPS, ReferenceVisionLayers, VisionLayers


class TEVisionLayers(VisionLayers):
    """Attention in windows runs in our own kernel, longer segments in cuDNN."""

    def __init__(self, vision: VisionConfig, config: TransformerConfig, device: torch.device) -> None:
        """`config`: the decoder's, which says whether matrix products are in fp8."""
        self._config, self._device = config, device
        self.activation = SwiGLU()  # an operation: `branch` fuses it with its neighbours
        self._cudnn = DotProductAttention(vision.num_heads, vision.head_dim, attention_dropout=0.0, qkv_format="thd")
        self._reference = ReferenceVisionLayers()

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        return Linear(inputs, outputs, params_dtype=self._config.params_dtype, device=self._device)

    def norm(self, size: int) -> nn.Module:
        return RMSNorm(size, eps=NORM_EPS, dtype=self._config.params_dtype, device=self._device)

    def branch(self, x: Tensor, *modules: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Casts to fp8 are done in the kernels of the norm and of SwiGLU, and the kernel of the norm's backward pass
        adds the gradient of the residual: as megatron.core's TEFusedMLP, made of operations that borrow the modules'
        parameters.
        """
        operations = Sequential(MakeExtraOutput())
        for module in modules:
            operations.extend(_borrowed(module) if isinstance(module, Linear) else [module])
        out, residual = operations(x)
        return out, residual

    def attend(self, qkv: Tensor, rotary: Rotary, cu_seqlens: Tensor, longest: int) -> Tensor:
        if qkv.dtype != torch.bfloat16:  # no kernel takes float32
            return self._reference.attend(qkv, rotary, cu_seqlens, longest)
        if longest <= LARGEST:
            return window_attention(qkv, rotary.cos, rotary.sin, cu_seqlens, longest)
        if self._config.deterministic_mode:
            return segment_flash(*rotated(qkv, rotary), cu_seqlens, causal=False)
        segments = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens}
        bounds = {"max_seqlen_q": longest, "max_seqlen_kv": longest}
        out: Tensor = self._cudnn(*rotated(qkv, rotary), **segments, **bounds, attn_mask_type="padding")
        return out

    def precision(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = get_fp8_context(self._config)
        return context


def _borrowed(linear: Linear) -> list[nn.Module]:
    outputs, inputs = linear.weight.shape
    kind = {"device": "meta", "dtype": linear.weight.dtype}
    product = BasicLinear(inputs, outputs, accumulate_into_main_grad=linear.fuse_wgrad_accumulation, **kind)
    bias = Bias(outputs, **kind)
    product.weight, bias.bias = linear.weight, linear.bias
    return [product, bias]


def rotated(qkv: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Return query and key, rotated as rope.rotate does but in one kernel, and value; each [P, heads, D]."""
    query, key, value = qkv[:, None].unbind(2)  # a sequence of batch 1, so that each patch has a separate angle
    angles = rotary.angles.repeat(1, 2)[:, None, None]
    query, key = (apply_rotary_pos_emb(x, angles, tensor_format="sbhd", fused=True)[:, 0] for x in (query, key))
    # A copy of value: as a view it would keep query and key, as they were before RoPE, alive for the backward pass.
    return query, key, value[:, 0].contiguous()
