"""The interface of a model family: all that the planner, the trainer and the converter ask about one kind of model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kanyun.storage import Folder
from trainer.data.patches import PatchGeometry
from trainer.models.config import Compute, ModelConfig
from trainer.models.costs import Costs
from trainer.models.names import EMBEDDING, HEAD, Row, decoder_widths

if TYPE_CHECKING:
    from trainer.models.language import LanguageModel
    from trainer.runtime import Runtime


class Family(ABC):
    """A folder below trainer/models holds one subclass and, in `family.py`, its instance FAMILY.

    Importing that module must import neither torch nor megatron; `build` imports them when it runs.
    """

    sizes: Mapping[str, ModelConfig]  # the released models, for planning without a download

    @abstractmethod
    def read_config(self, values: dict[str, Any], folder: Folder) -> ModelConfig:
        """Return the configuration that config.json (`values`) of a Hugging Face folder states.

        Raises KeyError for a missing field, UserError for an option that the family's models do not use.
        """

    def costs(self, config: ModelConfig) -> Costs:
        """Return the model's parameters, FLOPs and bytes. A family whose layers differ returns a subclass."""
        return Costs(config)

    def geometry(self, config: ModelConfig) -> PatchGeometry | None:
        """Return how the vision tower wants an image's patches; None for a text model."""
        return PatchGeometry(config.vision.patch_size, config.vision.merge_size) if config.vision else None

    @abstractmethod
    def table(self, config: ModelConfig) -> tuple[Row, ...]:
        """Return every tensor of this model, in the order of the forward pass."""

    def widths(self, config: ModelConfig) -> Mapping[str, int]:
        """Return what the letters of shapes in `table` stand for. A family with a vision tower adds the tower's."""
        return decoder_widths(config)

    def canonical(self, name: str) -> str:
        """Return a Hugging Face tensor's name as `table` spells it. Families with two layouts of keys override it."""
        return name

    def copies(self, config: ModelConfig) -> Mapping[str, str]:
        """Return tensors that a folder may hold although they repeat another: name -> the one that is repeated.

        Some released models with tied embeddings have the output head in their files all the same.
        """
        embedding = next(row for row in self.table(config) if row.megatron == EMBEDDING.megatron)
        return {HEAD.hf[0]: embedding.hf[0]} if config.tied else {}

    @abstractmethod
    def build(self, config: ModelConfig, runtime: "Runtime", compute: Compute) -> "LanguageModel":
        """Return the model on the runtime's device, its weights not yet drawn."""
