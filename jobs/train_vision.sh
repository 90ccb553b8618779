#!/usr/bin/env bash
# Train a model of images and text on packs. The same trainer: the model folder in the config makes the difference.
# usage: jobs/train_vision.sh CONFIG.yaml [key=value ...]
# example: jobs/train_vision.sh jobs/recipes/qwen2_5_vl_3b.yaml data=work/packed output=runs/vl
# On several nodes as jobs/pretrain.sh --help says. DRY_RUN=1 prints the command.
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 1 "$@"
train "$@"
