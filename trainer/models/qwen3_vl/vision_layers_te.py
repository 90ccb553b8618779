"""The same layers from Transformer Engine. Imported only where there is a GPU."""

from typing import Any

from torch import nn
from transformer_engine.pytorch import LayerNorm
from transformer_engine.pytorch.ops import GELU

from trainer.models.qwen2_5.vision_layers import NORM_EPS
from trainer.models.qwen2_5.vision_layers_te import TEVisionLayers


class TELayers(TEVisionLayers):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.activation = GELU()  # Transformer Engine's is the approximation by tanh

    def norm(self, size: int) -> nn.Module:
        return LayerNorm(size, eps=NORM_EPS, dtype=self._config.params_dtype, device=self._device)
