"""Trainer of Qwen2.5 and Qwen2.5-VL on megatron.core."""

import logging
import warnings

# What megatron.core says when it is imported (no Apex, no Transformer Engine), builds a GPTModel (deprecated in 0.19,
# but its successor has no mrope), steps its optimizer or loads a checkpoint is known; it hides what people should read.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\.")
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
logging.getLogger("megatron").setLevel(logging.ERROR)
