"""The family of dense Qwen3 (model_type qwen3). Its decoder is the shared one; config.json switches q/k norm on."""

from typing import TYPE_CHECKING, Any

from kanyun.storage import Folder
from trainer.models.config import Compute, ModelConfig
from trainer.models.family import Family
from trainer.models.names import Row
from trainer.models.qwen3 import names
from trainer.models.qwen3.config import read_config
from trainer.models.qwen3.sizes import SIZES

if TYPE_CHECKING:
    from trainer.models.language import LanguageModel
    from trainer.runtime import Runtime


class Qwen3Family(Family):
    sizes = SIZES

    def read_config(self, values: dict[str, Any], folder: Folder) -> ModelConfig:
        return read_config(values, folder)

    def table(self, config: ModelConfig) -> tuple[Row, ...]:
        return names.table(config)

    def build(self, config: ModelConfig, runtime: "Runtime", compute: Compute) -> "LanguageModel":
        from trainer.models.language import LanguageModel

        return LanguageModel(config, runtime, compute)


FAMILY = Qwen3Family()
