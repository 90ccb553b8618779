#!/usr/bin/env bash
# A checkpoint of the trainer (or a run folder: its last one) -> a folder that transformers loads.
# usage: jobs/convert_to_huggingface.sh CHECKPOINT OUT
source "$(dirname "$0")/common.sh"
need 2 "$@"
exec "$python" -m convert to-hf "$@"
