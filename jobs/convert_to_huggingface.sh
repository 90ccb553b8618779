#!/usr/bin/env bash
# A checkpoint of the trainer (or a run folder: its last one) -> a folder that transformers loads.
# usage: jobs/convert_to_huggingface.sh CHECKPOINT OUT [--overwrite]
# example: jobs/convert_to_huggingface.sh runs/qwen2_5_7b hf/qwen2_5_7b
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 2 "$@"
run "$python" -m convert to-hf "$@"
