"""Qwen2.5-VL: the language model, with visual tokens in place of its image tokens."""

from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from torch import Tensor
from torch.nn.functional import pad

from trainer.data.batch import Batch
from trainer.models.config import BFLOAT16, Compute, ModelConfig, VisionConfig
from trainer.models.language import LanguageModel
from trainer.models.qwen2_5.vision import GatedMLP, VisionTower
from trainer.models.qwen2_5.vision_layers import ReferenceVisionLayers, VisionLayers
from trainer.runtime import Runtime


class Qwen2_5VL(LanguageModel):  # noqa: N801 - the model's name
    """A batch always has patches, dummies if there is no image: every step of every rank does the same work."""

    def __init__(self, model_config: ModelConfig, runtime: Runtime, compute: Compute = BFLOAT16) -> None:
        super().__init__(model_config, runtime, compute)
        assert model_config.vision is not None
        # The tower is whole on every tensor-parallel rank.
        layers = self._layers(model_config.vision, runtime)
        recomputed = compute.recomputed_blocks
        self.vision = VisionTower(model_config.vision, layers, runtime.device, runtime.dtype, recomputed)

    def _layers(self, vision: VisionConfig, runtime: Runtime) -> VisionLayers:
        if runtime.cuda:
            from trainer.models.qwen2_5.vision_layers_te import TEVisionLayers

            return TEVisionLayers(vision, self.config, runtime.device)
        return ReferenceVisionLayers()

    def clear_padding(self) -> None:
        for module in self.vision.modules():
            if isinstance(module, GatedMLP):
                module.clear_padding()

    def _embed(self, batch: Batch) -> Tensor:
        assert batch.vision is not None, "a batch for an image model carries patches, even if they are dummies"
        text = super()._embed(batch)
        images = self.vision(batch.vision)[:, None]  # [M, 1, H]
        # One more row, where padding goes: no shape and no branch depends on how many visual tokens are real.
        rows = pad(text, (0, 0, 0, 0, 0, 1)).index_copy(0, batch.vision.token_index, images)
        embeddings = rows[: len(text)]
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings)
        return embeddings
