# Sourced by the scripts beside it. They may be called from any folder: relative IN and OUT are the caller's.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-.venv/bin/python}
[[ $python != .venv/* ]] || python=$root/$python
# Java and Python take names of files for UTF-8, in a container without LANG too.
[[ $(locale charmap 2>/dev/null) == UTF-8 ]] || export LC_ALL=C.UTF-8 PYTHONUTF8=1

# need N "$@": with fewer than N arguments, print the script's own usage line and stop.
need() {
  if (($# - 1 < $1)); then
    grep -m1 '^# usage: ' "$0" | cut -c3- >&2
    exit 2
  fi
}

# spark_stage STAGE ARGS...: on this machine, or on the cluster that SPARK_MASTER names; where SPARK_SUBMIT_OPTIONS is set
# (say "--master yarn --num-executors 40 --executor-memory 8g") through spark-submit. The same code, which the driver ships.
spark_stage() {
  if [[ -z ${SPARK_SUBMIT_OPTIONS:-} ]]; then
    exec "$python" -m pipeline "$@"
  fi
  export PYSPARK_PYTHON=${PYSPARK_PYTHON:-$python} PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  local submit=${SPARK_HOME:+$SPARK_HOME/bin/}spark-submit
  command -v "$submit" >/dev/null || submit=$(dirname "$python")/spark-submit # pyspark's own
  # shellcheck disable=SC2086  # the options are words
  exec "$submit" $SPARK_SUBMIT_OPTIONS "$root/jobs/spark_main.py" "$@"
}

# train CONFIG [key=value ...]: one process a GPU, or one on the CPU; NPROC says otherwise. On several nodes set NNODES,
# NODE_RANK and MASTER_ADDR as your scheduler gives them. SIGTERM or SIGUSR1 ends the run after its step, saved, with exit
# code 85: give the same command again, or let the scheduler (Slurm: sbatch --signal=B:USR1@300, and scontrol requeue on 85).
# Ranks that die are started again from the last checkpoint, up to RESTARTS times (3).
train() {
  local processes=1 nodes=(--standalone)
  ! nvidia-smi -L >/dev/null 2>&1 || processes=gpu
  [[ ${NNODES:-1} == 1 ]] ||
    nodes=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
  exec "$python" "$root/trainer/launch.py" "${nodes[@]}" --nproc-per-node "${NPROC:-$processes}" -- "$@"
}
