"""The same decoder layers as in layers.py, of Transformer Engine's modules. Imported only where there is a GPU."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TEFusedMLP,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.ops import MakeExtraOutput, Sequential

from trainer.kernels.norm_rope import NormedRope
from trainer.kernels.segment_flash import segment_flash
from trainer.models.config import Compute, ModelConfig
from trainer.models.layers import decoder_layers


class TESegmentAttention(TEDotProductAttention):
    """layers.SegmentAttention through Transformer Engine's kernels: packed ("thd") for them only, not for RoPE."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, **kwargs: Any) -> Tensor:
        """query [T, 1, heads, D], key and value [T, 1, groups, D] -> [T, 1, heads * D], causal."""
        length = len(query)  # an upper bound of every segment; a closer one makes cuDNN no faster
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=length,
            max_seqlen_kv=length,
        )
        out = super().forward(
            query[:, 0], key[:, 0], value[:, 0], None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed
        )
        return out.reshape(length, 1, -1)


class NormedSelfAttention(SelfAttention):
    """Query and key heads are normalized, and rotated, in the kernel that splits them from the value's."""

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        self._angles = rotary_pos_emb[:, 0, 0, : rotary_pos_emb.shape[-1] // 2]  # the other half repeats them
        out: tuple[Tensor, Tensor | None] = super().forward(*args, rotary_pos_emb=None, **kwargs)
        return out

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [T, 1, H] -> query [T, 1, heads, D], key and value [T, 1, groups, D]."""
        kwargs["split_qkv"] = False
        mixed, _ = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        width = self.hidden_size_per_attention_head
        tokens, _, groups, values = mixed.shape
        heads = mixed.view(tokens, groups, values // width, width)
        norms, eps = (self.q_layernorm.weight, self.k_layernorm.weight), self.config.layernorm_epsilon
        return tuple(x[:, None] for x in NormedRope.apply(heads, *norms, self._angles, eps))


class DeterministicAttention(nn.Module):
    """The same, with the same bits in every run."""

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, **kwargs: Any) -> Tensor:
        out = segment_flash(query[:, 0], key[:, 0], value[:, 0], cu_seqlens, causal=True)
        return out.flatten(1)[:, None]


class ResidualMLP(TEFusedMLP):
    """x + MLP(norm(x)): the kernel of the norm's backward pass adds the gradient that goes past it.

    Casts to fp8 are done in the kernels of the norm and of SwiGLU: 1.5B is 2 % faster than with megatron.core's MLP.
    """

    saved_tensors: Callable[[], AbstractContextManager[Any]] = nullcontext  # for ActivationOffload to replace

    def _make_fused_impl(self) -> Sequential:
        return super()._make_fused_impl().insert(0, MakeExtraOutput())

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        with self.saved_tensors():
            (out, residual), _ = super().forward(hidden_states, **kwargs)
        return residual + out, None


Join = Callable[[tuple[Tensor, None], Tensor, float], Tensor]  # a module's output and bias, the residual, dropout


def add_residual(training: bool, fused: bool) -> Join:
    """megatron.core's bias_dropout_add where there is neither bias nor dropout."""
    return lambda out, residual, dropout: residual + out[0]


def residual_added(training: bool, fused: bool) -> Join:
    """Stand in for `add_residual` after ResidualMLP, which has added the residual."""
    return lambda out, residual, dropout: out[0]


def te_layers(config: ModelConfig, compute: Compute, deterministic: bool) -> TransformerBlockSubmodules:
    """Return the specification of a whole decoder out of Transformer Engine modules; norms are fused into linears."""
    head_norm = TENorm if config.qk_norm else None
    layer = TransformerLayerSubmodules(
        self_attention=ModuleSpec(
            module=NormedSelfAttention if config.qk_norm else SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=TELayerNormColumnParallelLinear,
                core_attention=DeterministicAttention if deterministic else TESegmentAttention,
                linear_proj=TERowParallelLinear,
                q_layernorm=head_norm,
                k_layernorm=head_norm,
            ),
        ),
        self_attn_bda=add_residual,
        mlp=partial(
            ResidualMLP.as_mlp_submodule,
            submodules=MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear),
        ),
        mlp_bda=residual_added,
    )
    return decoder_layers(config, compute, layer, TENorm)


def accumulate_in_place(model: nn.Module) -> None:
    """Let the matrix product of a weight's gradient add to main_grad itself. Call it when DDP has made main_grad.

    TransformerConfig.gradient_accumulation_fusion would say the same, but the output head refuses it without APEX.
    """
    for module in model.modules():
        if isinstance(module, TransformerEngineBaseModule):
            module.fuse_wgrad_accumulation = True
