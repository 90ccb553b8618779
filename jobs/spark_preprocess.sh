#!/usr/bin/env bash
# Preprocess: rows of jsonl, parquet or tar files -> checked samples; image bytes go into blobs, once.
# usage: jobs/spark_preprocess.sh RAW OUT --dataset messages|llava|text [--overwrite]
# example: jobs/spark_preprocess.sh hdfs://namenode:9820/raw/charts hdfs://namenode:9820/stages/charts --dataset llava
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 4 "$@"
spark_stage preprocess "$@"
