"""The family of dense Qwen3-VL (model_type qwen3_vl): Qwen3's decoder with another vision tower than Qwen2.5-VL's."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kanyun.storage import Folder
from trainer.data.patches import PatchGeometry
from trainer.models.config import Compute, ModelConfig
from trainer.models.costs import Costs
from trainer.models.family import Family
from trainer.models.names import Row, tower_widths
from trainer.models.qwen3_vl import names
from trainer.models.qwen3_vl.config import read_config, vision_of
from trainer.models.qwen3_vl.costs import DeepstackCosts
from trainer.models.qwen3_vl.positions import LearnedPositions
from trainer.models.qwen3_vl.sizes import SIZES

if TYPE_CHECKING:
    from trainer.models.language import LanguageModel
    from trainer.runtime import Runtime


class Qwen3VLFamily(Family):
    sizes = SIZES

    def read_config(self, values: dict[str, Any], folder: Folder) -> ModelConfig:
        return read_config(values, folder)

    def costs(self, config: ModelConfig) -> Costs:
        return DeepstackCosts(config)

    def geometry(self, config: ModelConfig) -> PatchGeometry:
        vision = vision_of(config)
        return LearnedPositions(vision.patch_size, vision.merge_size, vision.position_side)

    def table(self, config: ModelConfig) -> tuple[Row, ...]:
        return names.table(config)

    def widths(self, config: ModelConfig) -> Mapping[str, int]:
        vision = vision_of(config)
        return {**super().widths(config), **tower_widths(vision), "n": vision.position_side**2}

    def canonical(self, name: str) -> str:
        return names.canonical(name)

    def build(self, config: ModelConfig, runtime: "Runtime", compute: Compute) -> "LanguageModel":
        from trainer.models.qwen3_vl.vision_language import Qwen3VL

        return Qwen3VL(config, runtime, compute)


FAMILY = Qwen3VLFamily()
