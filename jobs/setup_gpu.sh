#!/usr/bin/env bash
# Add Transformer Engine, which training on a GPU needs. Its torch part is compiled here, against the torch that is there:
# some minutes, with nvcc of the CUDA 13 toolkit.
# usage: jobs/setup_gpu.sh
source "$(dirname "$0")/common.sh"
cd "$root"
if ! command -v nvcc "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" >/dev/null; then
  echo "no nvcc found: install the CUDA 13 toolkit and set CUDA_HOME, or use the image of docker/Dockerfile.trainer" >&2
  exit 2
fi
"$python" -m pip install --disable-pip-version-check -c constraints.txt ninja pybind11
NVTE_FRAMEWORK=pytorch "$python" -m pip install --disable-pip-version-check -c constraints.txt \
  --no-build-isolation 'transformer-engine[core_cu13,pytorch]'
