"""What differs in the blocks of Qwen3-VL's vision tower from Qwen2.5-VL's: LayerNorm for RMSNorm, GELU for SwiGLU."""

from torch import Tensor, nn
from torch.nn.functional import gelu

from trainer.models.qwen2_5.vision_layers import NORM_EPS, ReferenceVisionLayers


class ReferenceLayers(ReferenceVisionLayers):
    def norm(self, size: int) -> nn.Module:
        return nn.LayerNorm(size, eps=NORM_EPS)

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        """[P, F] -> [P, F]: the blocks' GELU is the approximation by tanh, the mergers' is exact."""
        return gelu(x, approximate="tanh")
