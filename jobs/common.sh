# shellcheck shell=bash
# Sourced by the scripts beside it. They may be called from any folder: relative IN and OUT are the caller's.
# DRY_RUN=1 prints the commands that a script would run, and runs none.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-.venv/bin/python}
[[ $python != .venv/* ]] || python=$root/$python
# Java and Python take names of files for UTF-8, in a container without LANG too.
[[ $(locale charmap 2>/dev/null) == UTF-8 ]] || export LC_ALL=C.UTF-8 PYTHONUTF8=1

# need N "$@": print the script's own comment if it is asked for, or its usage line where there are fewer than N arguments.
need() {
  if [[ " ${*:2} " == *" --help "* || " ${*:2} " == *" -h "* ]]; then
    sed -nE '2,/^[^#]/s/^# ?//p' "$0"
    exit 0
  fi
  if (($# - 1 < $1)); then
    grep -m1 '^# usage: ' "$0" | cut -c3- >&2
    exit 2
  fi
}

# call COMMAND...: one of several commands of a script.
call() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

# run COMMAND...: the last thing that a script does.
run() {
  [[ -z ${DRY_RUN:-} ]] || { call "$@" && exit 0; }
  exec "$@"
}

# spark_stage STAGE ARGS...: on all cores of this machine, or on the cluster that SPARK_MASTER names:
#   spark://HOST:7077    Spark's own; Python and its packages are at the same place on all nodes, or in SPARK_ENV
#   yarn                 with HADOOP_CONF_DIR; Python and its packages are what jobs/pack_env.sh made: SPARK_ENV=FILE.tar.gz
#   k8s://https://...    executors are pods of SPARK_IMAGE; `python -m jobs.render` makes the driver's manifest
# Our own code goes along with every job. SPARK_SUBMIT_OPTIONS are more options of spark-submit, which win: "--queue etl
# --num-executors 40 --executor-cores 4 --executor-memory 8g".
spark_stage() {
  local master=${SPARK_MASTER:-local} options=()
  if [[ -z ${SPARK_SUBMIT_OPTIONS:-}${SPARK_ENV:-} && $master =~ ^(local|spark:) ]]; then
    run "$python" -m pipeline "$@"
  fi
  local worker=${PYSPARK_PYTHON:-$python} env=()
  [[ -z ${SPARK_MASTER:-} ]] || options+=(--master "$master")
  # An executor's heap holds little: rows are in its Python workers, which are outside of it.
  [[ $master =~ ^(yarn|k8s:) ]] && options+=(--deploy-mode client --conf spark.executor.memoryOverheadFactor=1.0)
  if [[ -n ${SPARK_ENV:-} ]]; then
    options+=(--archives "$SPARK_ENV#environment")
    worker=./environment/bin/python
  fi
  if [[ $master == k8s:* ]]; then
    worker=python3 # of the image
    options+=(
      --conf "spark.kubernetes.container.image=${SPARK_IMAGE:?is not set: the image of docker/Dockerfile.pipeline}"
      --conf "spark.kubernetes.namespace=${SPARK_NAMESPACE:-default}"
    )
    # In a pod: executors reach the driver at its address, and go when its pod goes.
    [[ -z ${POD_NAME:-} ]] ||
      options+=(--conf "spark.driver.host=$POD_IP" --conf "spark.kubernetes.driver.pod.name=$POD_NAME")
    [[ -z ${SPARK_POD_TEMPLATE:-} ]] || options+=(--conf "spark.kubernetes.executor.podTemplateFile=$SPARK_POD_TEMPLATE")
  fi
  env+=("PYSPARK_PYTHON=$worker" "PYSPARK_DRIVER_PYTHON=$python" "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}")
  local submit=${SPARK_HOME:+$SPARK_HOME/bin/}spark-submit
  command -v "$submit" >/dev/null || submit=$(dirname "$python")/spark-submit # pyspark's own
  # shellcheck disable=SC2206  # the options are words
  options+=(${SPARK_SUBMIT_OPTIONS:-})
  run env "${env[@]}" "$submit" "${options[@]}" "$root/jobs/spark_main.py" "$@"
}

# rendezvous: set NNODES, NODE_RANK and MASTER_ADDR as the scheduler gives them, unless they are set.
rendezvous() {
  if [[ -n ${VC_TASK_INDEX:-} ]]; then # Volcano's plugins env and svc; the task is called worker
    : "${NNODES:=$VC_WORKER_NUM}" "${NODE_RANK:=$VC_TASK_INDEX}" "${MASTER_ADDR:=${VC_WORKER_HOSTS%%,*}}"
  elif [[ -n ${JOB_COMPLETION_INDEX:-} ]]; then # an indexed Job of Kubernetes; the others are in its manifest
    : "${NODE_RANK:=$JOB_COMPLETION_INDEX}"
  elif [[ -n ${SLURM_NODEID:-} ]]; then # one task a node
    : "${NNODES:=$SLURM_NNODES}" "${NODE_RANK:=$SLURM_NODEID}"
    : "${MASTER_ADDR:=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
  fi
}

# train CONFIG [key=value ...]: one process a GPU, or one on the CPU; NPROC says otherwise. On several nodes each gives the
# same command, and ranks are numbered node by node, so that those of one node are neighbours. SIGTERM or SIGUSR1 ends the
# run after its step, saved, with exit code 85: the same command goes on, and the manifests of jobs/render.py give it.
# Ranks that die are started again from the last checkpoint, up to RESTARTS times (3).
train() {
  local processes=1 nodes=(--standalone)
  rendezvous
  ! nvidia-smi -L >/dev/null 2>&1 || processes=gpu
  if [[ ${NNODES:-1} != 1 ]]; then
    : "${NODE_RANK:?is not set: 0 on the node of MASTER_ADDR, 1 on the next}" "${MASTER_ADDR:?is not set: the name of node 0}"
    nodes=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
  fi
  run "$python" "$root/trainer/launch.py" "${nodes[@]}" --nproc-per-node "${NPROC:-$processes}" -- "$@"
}
