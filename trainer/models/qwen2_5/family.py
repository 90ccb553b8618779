"""The family of Qwen2.5 (model_type qwen2) and Qwen2.5-VL (qwen2_5_vl)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kanyun.storage import Folder
from trainer.data.patches import PatchGeometry
from trainer.models.config import Compute, ModelConfig
from trainer.models.costs import Costs
from trainer.models.family import Family
from trainer.models.names import Row, tower_widths
from trainer.models.qwen2_5 import names
from trainer.models.qwen2_5.config import read_config, vision_of
from trainer.models.qwen2_5.costs import VisionLanguageCosts
from trainer.models.qwen2_5.sizes import SIZES
from trainer.models.qwen2_5.windows import WindowGeometry

if TYPE_CHECKING:
    from trainer.models.language import LanguageModel
    from trainer.runtime import Runtime


class Qwen2_5Family(Family):  # noqa: N801 - the model's name
    sizes = SIZES

    def read_config(self, values: dict[str, Any], folder: Folder) -> ModelConfig:
        return read_config(values, folder)

    def costs(self, config: ModelConfig) -> Costs:
        return VisionLanguageCosts(config) if config.vision else Costs(config)

    def geometry(self, config: ModelConfig) -> PatchGeometry | None:
        if config.vision is None:
            return None
        vision = vision_of(config)
        return WindowGeometry(vision.patch_size, vision.merge_size, vision.window_size)

    def table(self, config: ModelConfig) -> tuple[Row, ...]:
        return names.table(config)

    def widths(self, config: ModelConfig) -> Mapping[str, int]:
        return {**super().widths(config), **(tower_widths(config.vision) if config.vision else {})}

    def canonical(self, name: str) -> str:
        return names.canonical(name)

    def build(self, config: ModelConfig, runtime: "Runtime", compute: Compute) -> "LanguageModel":
        from trainer.models.language import LanguageModel
        from trainer.models.qwen2_5.vision_language import Qwen2_5VL

        return (Qwen2_5VL if config.vision else LanguageModel)(config, runtime, compute)


FAMILY = Qwen2_5Family()
