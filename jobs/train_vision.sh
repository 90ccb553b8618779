#!/usr/bin/env bash
# Train Qwen2.5-VL (images and text) on packs. The same trainer: the model folder in the config makes the difference.
# usage: jobs/train_vision.sh CONFIG.yaml [key=value ...]   (see jobs/recipes/qwen2_5_vl_3b.yaml)
source "$(dirname "$0")/common.sh"
need 1 "$@"
train "$@"
