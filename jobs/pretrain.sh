#!/usr/bin/env bash
# Train a text model on packs. Resumes by itself from the newest whole checkpoint in output.
# usage: jobs/pretrain.sh CONFIG.yaml [key=value ...]
# example: jobs/pretrain.sh jobs/recipes/qwen2_5_0_5b.yaml data=work/packed output=runs/first
# On several nodes give the same command on each, with NNODES, NODE_RANK and MASTER_ADDR; Volcano, Kubernetes and Slurm set
# them by the manifests of `python -m jobs.render`. DRY_RUN=1 prints the command.
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 1 "$@"
train "$@"
