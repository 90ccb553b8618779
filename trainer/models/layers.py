"""The decoder layers of megatron.core's GPTModel on a CPU: the reference that layers_te.py's fast ones must match.

Checkpoints of both have the same names: those of the fused Transformer Engine layers.
"""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from trainer.kernels.attention import segment_attention
from trainer.models.config import ModelConfig


class SegmentAttention(nn.Module):
    """Core attention of a pack. megatron.core hands its `attention_mask` through untouched: here it is cu_seqlens.

    megatron.core's own packing (packed_seq_params) is not used: with it, stock RoPE gives every segment but the first
    wrong angles.
    """

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, **kwargs: Any) -> Tensor:
        """query [T, 1, heads, D], key and value [T, 1, groups, D] -> [T, 1, heads * D], causal."""
        out = segment_attention(query[:, 0], key[:, 0], value[:, 0], cu_seqlens, causal=True)
        return out.flatten(1)[:, None]


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm under sequence parallelism, where megatron.core's wrapper of it refuses to run."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        # Each tensor-parallel rank sees some of the tokens (a q/k norm: some of the heads). megatron.core sums the
        # gradients of parameters with this mark over those ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def reference_layers(config: ModelConfig) -> TransformerBlockSubmodules:
    """Return the specification of a whole decoder out of torch and megatron.core modules."""
    head_norm = RMSNorm if config.qk_norm else None
    layer = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=SegmentAttention,
                linear_proj=RowParallelLinear,
                q_layernorm=head_norm,
                k_layernorm=head_norm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=ModuleSpec(
            module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        ),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(layer_specs=[spec] * config.num_layers, layer_norm=RMSNorm)
