#!/usr/bin/env bash
# A Hugging Face folder of Qwen2.5 or Qwen2.5-VL -> a checkpoint for the trainer's init.
# usage: jobs/convert_to_megatron.sh HF_FOLDER OUT
source "$(dirname "$0")/common.sh"
need 2 "$@"
exec "$python" -m convert to-megatron "$@"
