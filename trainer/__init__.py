"""Trainer of Qwen models on megatron.core. Importing it prepares the process, see environment.py."""

from trainer import environment  # noqa: F401 - before anything that imports torch
