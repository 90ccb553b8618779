#!/usr/bin/env bash
# Pack Python's packages for the executors of a cluster that has none of them: a fresh environment with the pipeline's
# exact versions, as an archive that spark-submit ships (SPARK_ENV=FILE). The nodes need the same Python at the same path.
# usage: jobs/pack_env.sh FILE.tar.gz
# example: jobs/pack_env.sh env.tar.gz && SPARK_MASTER=yarn SPARK_ENV=env.tar.gz jobs/spark_run.sh my_recipe.yaml
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 1 "$@"
file=$(realpath -m "$1")
packages="$root""[pipeline]"
# Spark's jars, 400 MB, come with the job or the workers.
pack=("$python" -m venv_pack --prefix ENV --output "$file" --exclude "*/pyspark/jars/*" --force --quiet)
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "$python" -m venv ENV && printf '&& '
  printf '%q ' ENV/bin/python -m pip install -c "$root/constraints.txt" "$packages" && printf '&& '
  run "${pack[@]}"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/env"
"$work/env/bin/python" -m pip install --disable-pip-version-check -c "$root/constraints.txt" "$packages"
"${pack[@]/#ENV/$work/env}"
