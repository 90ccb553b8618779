#!/usr/bin/env bash
# Pack: whole samples into packs of N tokens, written as a kanyun dataset below OUT.
# usage: jobs/spark_packing.sh IN OUT --length N [--part N] [--epoch N] [--vision-budget N] [--overwrite]
source "$(dirname "$0")/common.sh"
need 4 "$@"
spark_stage pack "$@"
