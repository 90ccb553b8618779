#!/usr/bin/env bash
# Pack: whole samples into packs of N tokens, written as a kanyun dataset below OUT.
# usage: jobs/spark_packing.sh IN OUT --length N [--part N] [--epoch N] [--vision-budget N] [--overwrite]
# example: SPARK_MASTER=yarn SPARK_ENV=env.tar.gz jobs/spark_packing.sh work/build packed --length 8192
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 4 "$@"
spark_stage pack "$@"
