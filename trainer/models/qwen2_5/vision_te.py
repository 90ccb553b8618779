"""The vision tower's layers from Transformer Engine, and Triton. Imported only where there is a GPU."""

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformer_engine.pytorch import DotProductAttention, Linear, RMSNorm
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
from transformer_engine.pytorch.ops import BasicLinear, Bias, MakeExtraOutput, Sequential, SwiGLU

from trainer.kernels.rope import Rotary
from trainer.kernels.window_attention import LARGEST, window_attention
from trainer.models.qwen2_5.config import VisionConfig
from trainer.models.qwen2_5.vision import NORM_EPS, Attend, Layers, reference_layers


def te_layers(vision: VisionConfig, config: TransformerConfig, device: torch.device) -> Layers:
    """`config`: the language model's, which says whether matrix products are in fp8."""

    def linear(inputs: int, outputs: int) -> nn.Module:
        return Linear(inputs, outputs, params_dtype=config.params_dtype, device=device)

    def norm(size: int) -> nn.Module:
        return RMSNorm(size, eps=NORM_EPS, dtype=config.params_dtype, device=device)

    return Layers(linear, norm, SwiGLU(), _branch, te_attend(vision), lambda: get_fp8_context(config))


def te_attend(vision: VisionConfig) -> Attend:
    """Windows by a kernel of ours, longer segments by cuDNN."""
    reference = reference_layers().attend
    whole = DotProductAttention(vision.num_heads, vision.head_dim, attention_dropout=0.0, qkv_format="thd")

    def attend(qkv: Tensor, rotary: Rotary, cu_seqlens: Tensor, longest: int) -> Tensor:
        if qkv.dtype != torch.bfloat16:  # no kernel has float32
            return reference(qkv, rotary, cu_seqlens, longest)
        if longest <= LARGEST:
            return window_attention(qkv, rotary.cos, rotary.sin, cu_seqlens, longest)
        ends = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens}
        bounds = {"max_seqlen_q": longest, "max_seqlen_kv": longest}
        out: Tensor = whole(*turned(qkv, rotary), **ends, **bounds, attn_mask_type="padding")
        return out

    return attend


def _branch(x: Tensor, *modules: nn.Module) -> tuple[Tensor, Tensor]:
    """Casts to fp8 are done in the kernels of the norm and of SwiGLU, and the kernel of the norm's backward pass adds
    the gradient of the residual. As megatron.core's TEFusedMLP, made of operations that borrow the modules' parameters.
    """
    operations = Sequential(MakeExtraOutput())
    for module in modules:
        operations.extend(_borrowed(module) if isinstance(module, Linear) else [module])
    out, residual = operations(x)
    return out, residual


def _borrowed(linear: Linear) -> list[nn.Module]:
    outputs, inputs = linear.weight.shape
    kind = {"device": "meta", "dtype": linear.weight.dtype}
    product = BasicLinear(inputs, outputs, accumulate_into_main_grad=linear.fuse_wgrad_accumulation, **kind)
    bias = Bias(outputs, **kind)
    product.weight, bias.bias = linear.weight, linear.bias
    return [product, bias]


def turned(qkv: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key, by rope.rotate in one kernel, and value; each [P, heads, head_dim]."""
    query, key, value = qkv[:, None].unbind(2)  # a sequence of batch 1, so that each patch has its own angle
    angles = rotary.angles.repeat(1, 2)[:, None, None]
    query, key = (apply_rotary_pos_emb(x, angles, tensor_format="sbhd", fused=True)[:, 0] for x in (query, key))
    # A copy of value: as a view it would keep query and key, as they were before, alive for the backward pass.
    return query, key, value[:, 0].contiguous()
