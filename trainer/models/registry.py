"""The one table of model families: model_type of config.json -> family. A new model is a folder and a line here.

Families are imported when they are asked for, by name: planning and conversion read configurations, sizes and tensor
names without torch or megatron.
"""

from importlib import import_module

from kanyun.errors import UserError
from trainer.models.config import ModelConfig
from trainer.models.costs import Costs
from trainer.models.family import Family

# model_type -> the model's name for people, the module whose FAMILY knows it
_MODELS = {
    "qwen2": ("Qwen2.5", "trainer.models.qwen2_5.family"),
    "qwen2_5_vl": ("Qwen2.5-VL", "trainer.models.qwen2_5.family"),
    "qwen3": ("Qwen3", "trainer.models.qwen3.family"),
    "qwen3_vl": ("Qwen3-VL", "trainer.models.qwen3_vl.family"),
}


def get_family(model_type: str, *, where: str = "the model") -> Family:
    """Return the family of a model_type. `where` names the folder in the error.

    Raises UserError, naming the families there are, if none knows it.
    """
    if model_type not in _MODELS:
        *others, last = (f"{known} ({name})" for known, (name, _) in _MODELS.items())
        raise UserError(f"{where} is a {model_type!r} model: give one of {', '.join(others)} or {last}")
    family: Family = import_module(_MODELS[model_type][1]).FAMILY
    return family


def family_of(config: ModelConfig) -> Family:
    return get_family(config.model_type)


def costs_of(config: ModelConfig) -> Costs:
    return family_of(config).costs(config)


def published_sizes() -> dict[str, ModelConfig]:
    """Return the released models of all families: name -> configuration."""
    sizes: dict[str, ModelConfig] = {}
    for module in dict.fromkeys(module for _, module in _MODELS.values()):
        sizes |= import_module(module).FAMILY.sizes
    return sizes
