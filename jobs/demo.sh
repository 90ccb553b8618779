#!/usr/bin/env bash
# The whole way on one laptop, in a quarter of an hour, all of it below demo/: raw scans and text -> five Spark stages -> packs
# -> training -> Hugging Face -> held-out scans, answered by transformers alone. `make demo` calls it.
# usage: jobs/demo.sh [FAMILY]    the tiny model that is trained: qwen2_5_vl (unless told otherwise) or qwen3_vl
# example: jobs/demo.sh qwen3_vl
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 0 "$@"
family=${1:-qwen2_5_vl}
[[ $family == qwen2_5_vl || $family == qwen3_vl ]] || need 99
cd "$root"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step() { [[ -n ${DRY_RUN:-} ]] || printf '\n\033[1m== %s\033[0m (%d s)\n' "$1" "$SECONDS"; }

call rm -rf demo
step "raw data, and a tiny model's config and tokenizer"
call "$python" jobs/demo/make_raw.py demo
call "$python" jobs/demo/make_model.py demo/raw demo/model "$family"

step "five Spark stages: raw rows -> packs"
call "$python" -m pipeline run jobs/recipes/demo.yaml
call "$python" -m pipeline run jobs/recipes/demo_validation.yaml

step "every checksum and every count; a page that shows the packs"
call "$python" -m kanyun verify demo/pipeline/packed
call "$python" -m kanyun info demo/pipeline/packed
call "$python" -m kanyun preview demo/pipeline/packed demo/preview.html

step "training"
call jobs/train_vision.sh jobs/recipes/demo_train.yaml

step "to Hugging Face"
call "$python" -m convert to-hf demo/train demo/hf

step "held-out scans, by transformers alone"
call "$python" jobs/demo/score.py demo/hf demo/heldout/digits demo/score.json

step "result"
call "$python" jobs/demo/result.py demo
