#!/usr/bin/env bash
# Filter: clean rows to data/, the others with reason and evidence to quarantine/; exact duplicates too.
# usage: jobs/spark_filter.sh IN OUT [--near-duplicates keep|drop] [--overwrite]
# example: jobs/spark_filter.sh work/preprocess/charts work/filter/charts
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 2 "$@"
spark_stage filter "$@"
