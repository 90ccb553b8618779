#!/usr/bin/env bash
# All stages in a row, from the raw folders of a recipe to packs. What is done already is skipped.
# usage: jobs/spark_run.sh RECIPE.yaml [--overwrite]
# example: SPARK_MASTER=yarn SPARK_ENV=env.tar.gz SPARK_SUBMIT_OPTIONS="--num-executors 40" jobs/spark_run.sh my_recipe.yaml
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 1 "$@"
spark_stage run "$@"
