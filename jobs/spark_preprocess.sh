#!/usr/bin/env bash
# Preprocess: raw jsonl or parquet rows -> checked samples; image bytes go into blobs, once.
# usage: jobs/spark_preprocess.sh RAW OUT --dataset messages|llava|text [--overwrite]
source "$(dirname "$0")/common.sh"
need 4 "$@"
spark_stage preprocess "$@"
