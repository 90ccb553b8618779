"""The vision tower's layers from Transformer Engine. Imported only where there is a GPU."""

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformer_engine.pytorch import Linear, RMSNorm
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
from transformer_engine.pytorch.ops import SwiGLU

from trainer.model.vision import NORM_EPS, Layers


def te_layers(config: TransformerConfig, device: torch.device) -> Layers:
    """`config`: the language model's, which says whether matrix products are in fp8."""

    def linear(inputs: int, outputs: int) -> nn.Module:
        return Linear(inputs, outputs, params_dtype=config.params_dtype, device=device)

    def norm(size: int) -> nn.Module:
        return RMSNorm(size, eps=NORM_EPS, dtype=config.params_dtype, device=device)

    swiglu = SwiGLU()
    return Layers(linear, norm, _rotate, lambda x: swiglu(x), lambda: get_fp8_context(config))


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """rope.rotate in one kernel. As a sequence of batch 1, so that each patch has its own angle."""
    out: Tensor = apply_rotary_pos_emb(x[:, None], angles[:, None], tensor_format="sbhd", fused=True)
    return out[:, 0]
