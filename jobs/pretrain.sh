#!/usr/bin/env bash
# Train Qwen2.5 (text) on packs. Resumes by itself from the newest whole checkpoint in output.
# usage: jobs/pretrain.sh CONFIG.yaml [key=value ...]   (see jobs/recipes/qwen2_5_0_5b.yaml)
source "$(dirname "$0")/common.sh"
need 1 "$@"
train "$@"
