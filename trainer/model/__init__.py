"""Models: `build_model` makes the one that a Hugging Face config describes, from scratch."""

from trainer.model.build import build_model, freeze
from trainer.model.config import ModelConfig, VisionConfig
from trainer.model.qwen2_5 import Qwen2_5
from trainer.model.qwen2_5_vl import Qwen2_5VL

__all__ = ["ModelConfig", "Qwen2_5", "Qwen2_5VL", "VisionConfig", "build_model", "freeze"]
