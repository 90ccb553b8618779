#!/usr/bin/env bash
# Build: chat template, tokens, loss mask; image tokens from width and height alone.
# usage: jobs/spark_build_dataset.sh IN OUT --tokenizer HF_FOLDER --length N [--overflow drop|split] [--overwrite]
# example: jobs/spark_build_dataset.sh work/sample work/build --tokenizer models/Qwen2.5-VL-3B-Instruct --length 8192
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 6 "$@"
spark_stage build "$@"
