#!/usr/bin/env bash
# A Hugging Face folder -> a checkpoint for the trainer's init.
# usage: jobs/convert_to_megatron.sh HF_FOLDER OUT [--overwrite]
# example: jobs/convert_to_megatron.sh models/Qwen2.5-7B checkpoints/qwen2_5_7b
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 2 "$@"
run "$python" -m convert to-megatron "$@"
