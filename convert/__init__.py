"""Hugging Face folders to megatron checkpoints and back; on the CPU, wherever it is imported."""

import os

# Before torch starts: conversion copies bits, verification wants float32, and a model may be larger than a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"  # folders only, nothing is downloaded
