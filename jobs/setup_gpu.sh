#!/usr/bin/env bash
# Add Transformer Engine, which training on a GPU needs. Its torch part is compiled here unless NVIDIA has it ready for the
# torch that is there: minutes, with g++ and CUDA headers from PyPI; no CUDA toolkit is needed.
# usage: jobs/setup_gpu.sh
# example: make setup && jobs/setup_gpu.sh
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 0 "$@"
cd "$root"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
if [[ -z ${DRY_RUN:-} ]] && { ! command -v g++ >/dev/null || [[ ! -f $header ]]; }; then
  echo "g++ and Python's headers ($header) are needed to compile: apt-get install g++ python3-dev" >&2
  exit 2
fi
pip=("$python" -m pip install --disable-pip-version-check -c constraints.txt)
call "${pip[@]}" ninja nvidia-cuda-cccl nvidia-cuda-crt nvidia-cudnn-frontend pybind11 setuptools wheel
run env NVTE_BUILD_USE_NVIDIA_WHEELS=1 "${pip[@]}" --no-build-isolation 'transformer-engine[core_cu13,pytorch]'
