"""Qwen2.5-VL: the language model, with visual tokens in place of its image tokens."""

from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad

from trainer.data.batch import Batch
from trainer.models.config import BFLOAT16, Compute, ModelConfig
from trainer.models.language import LanguageModel
from trainer.models.qwen2_5.config import vision_of
from trainer.models.qwen2_5.vision import GatedMLP, VisionTower
from trainer.models.qwen2_5.vision_layers import ReferenceVisionLayers, VisionLayers
from trainer.runtime import Runtime


class Qwen2_5VL(LanguageModel):  # noqa: N801 - the model's name
    """A batch always has patches, dummies if there is no image: every step of every rank does the same work."""

    def __init__(self, model_config: ModelConfig, runtime: Runtime, compute: Compute = BFLOAT16) -> None:
        super().__init__(model_config, runtime, compute)
        # The tower is whole on every tensor-parallel rank.
        vision, layers = vision_of(model_config), self._layers(runtime)
        self.vision = VisionTower(vision, layers, runtime.device, runtime.dtype, compute.recomputed_blocks)

    def _layers(self, runtime: Runtime) -> VisionLayers:
        if runtime.cuda:
            from trainer.models.qwen2_5.vision_layers_te import TEVisionLayers

            return TEVisionLayers(vision_of(self.model_config), self.config, runtime.device)
        return ReferenceVisionLayers()

    def clear_padding(self) -> None:
        for module in self.vision.modules():
            if isinstance(module, GatedMLP):
                module.clear_padding()

    def _embed(self, batch: Batch) -> Tensor:
        assert batch.vision is not None, "a batch for an image model carries patches, even if they are dummies"
        images = self.vision(batch.vision)[:, None]  # [M, 1, H]
        return with_visual_tokens(super()._embed(batch), images, batch.vision.token_index, self.config)


def with_visual_tokens(tokens: Tensor, visual: Tensor, index: Tensor, config: TransformerConfig) -> Tensor:
    """Return `tokens` [T, ...] with row j of `visual` [M, ...] in row index[j].

    index [M] int64: T, one past the end, for padding. Under sequence parallelism only this rank's rows.
    """
    # One more row, where padding goes: no shape and no branch depends on how many visual tokens are real.
    room = pad(tokens, (0, 0) * (tokens.dim() - 1) + (0, 1))
    rows = room.index_copy(0, index, visual)[: len(tokens)]
    if config.sequence_parallel:
        rows = scatter_to_sequence_parallel_region(rows)
    return rows
