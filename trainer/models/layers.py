"""The decoder layers of megatron.core's GPTModel on a CPU: the reference that layers_te.py's fast ones must match.

Checkpoints of both have the same names: those of the fused Transformer Engine layers.
"""

from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
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
from torch.utils.checkpoint import checkpoint

from trainer.kernels.attention import segment_attention
from trainer.models.config import Compute, ModelConfig


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


class RecomputedLayer(TransformerLayer):
    """Keeps only its input, and is run again in the backward pass.

    Not megatron.core's recompute_num_layers: that takes the first layers, whose inputs of SwiGLU are offloaded.
    """

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        forward = super().forward
        if not hidden_states.requires_grad:  # which the checkpoint needs
            out: tuple[Tensor, Any] = forward(hidden_states, **kwargs)
            return out

        def run(x: Tensor) -> Tensor:
            with get_fp8_context(self.config, self.layer_number - 1):  # the backward pass is outside of the block's
                out: Tensor = forward(x, **kwargs)[0]
            return out

        # Reentrant: the first pass runs without gradients, so it casts nothing for a backward pass that casts anew.
        # preserve_rng_state: nothing is random, and a CUDA graph cannot read the generator's state.
        recomputed: Tensor = checkpoint(run, hidden_states, use_reentrant=True, preserve_rng_state=False)
        return recomputed, kwargs.get("context")


def decoder_layers(
    config: ModelConfig, compute: Compute, layer: TransformerLayerSubmodules, norm: Any
) -> TransformerBlockSubmodules:
    """Return the specification of a decoder out of such layers: the offloaded ones, then those that are recomputed."""
    kinds = [TransformerLayer] * compute.offloaded_layers + [RecomputedLayer] * compute.recomputed_layers
    kinds += [TransformerLayer] * (config.num_layers - len(kinds))
    return TransformerBlockSubmodules([ModuleSpec(module=kind, submodules=layer) for kind in kinds], layer_norm=norm)


def reference_layers(config: ModelConfig, compute: Compute) -> TransformerBlockSubmodules:
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
    return decoder_layers(config, compute, layer, RMSNorm)
