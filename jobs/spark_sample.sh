#!/usr/bin/env bash
# Sample: how many copies of each sample this epoch has. IN is one filter output, or a parent folder of several.
# usage: jobs/spark_sample.sh IN OUT [--ratios FILE.yaml] [--epoch N] [--seed N] [--overwrite]
# example: jobs/spark_sample.sh work/filter work/sample --epoch 1
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 2 "$@"
spark_stage sample "$@"
