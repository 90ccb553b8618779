#!/usr/bin/env bash
# Build the pipeline's image without a container engine, and run the demo's pipeline in it. As root on Debian:
#   apt-get install buildah debootstrap
# usage: docker/test.sh
# IMAGE: an image that is there already; without it one is built of BASE.
# BASE: the base image; without it debootstrap makes one of Debian 13. buildah keeps it, and the packages that pip fetched,
# for the next time. STORAGE_DRIVER=vfs where overlay mounts are not allowed: it copies each layer, of up to 1.6 GB, so
# that none are kept between instructions. Nine minutes on two busy cores with vfs, the base too (28 November 2026).
set -euo pipefail
[[ ${1:-} != --help ]] || { sed -n '2,/^set /{/^# /s/^# //p}' "$0"; exit 0; }
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-.venv/bin/python}
[[ $python != .venv/* ]] || python=$root/$python
export BUILDAH_ISOLATION=chroot
buildah() { command buildah ${STORAGE_DRIVER:+--storage-driver "$STORAGE_DRIVER"} "$@"; }

missing=0
for command in buildah debootstrap; do
  command -v "$command" >/dev/null || { echo "$command is missing: apt-get install buildah debootstrap" >&2 && missing=1; }
done
[[ $(id -u) == 0 ]] || { echo "building without an engine needs root" >&2 && missing=1; }
((missing == 0)) || exit 2

work=$(mktemp -d)
containers=()
cleanup() {
  for container in "${containers[@]}"; do buildah rm "$container" >/dev/null; done
  rm -rf "$work"
}
trap cleanup EXIT
# new_container FROM: sets `container`.
new_container() {
  container=$(buildah from --pull-never "$1")
  containers+=("$container")
}

if [[ -z ${BASE:-} ]]; then
  BASE=localhost/debian:trixie
  if ! buildah inspect --type image "$BASE" >/dev/null 2>&1; then
    debootstrap --variant=minbase trixie "$work/trixie" >/dev/null
    new_container scratch
    buildah add --quiet "$container" "$work/trixie" /
    # The certificate authorities that this machine trusts beside Debian's, where a proxy needs one.
    [[ ! -d /usr/local/share/ca-certificates ]] ||
      buildah add --quiet "$container" /usr/local/share/ca-certificates /usr/local/share/ca-certificates
    buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    buildah commit --quiet "$container" "$BASE"
  fi
fi

echo "== a bare Debian says what is missing: Python and Java"
new_container "$BASE"
code=0
said=$(buildah run --volume "$root:/kanyun:ro" "$container" -- /kanyun/jobs/setup.sh 2>&1) || code=$?
echo "$said"
((code == 2)) && grep -q '^Python 3.12 or 3.13 ' <<<"$said" && grep -q '^Java 17 or 21 ' <<<"$said"

if [[ -z ${IMAGE:-} ]]; then
  IMAGE=localhost/kanyun-pipeline:test
  echo "== build"
  cd "$root"
  layers=--layers=$([[ ${STORAGE_DRIVER:-} == vfs ]] && echo false || echo true)
  printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$work/pip.conf"
  buildah bud --quiet "$layers" --build-arg "BASE=$BASE" --secret "id=pip,src=$work/pip.conf" \
    -f docker/Dockerfile.pipeline -t "$IMAGE" .
  echo "built in $SECONDS s"
fi

echo "== no secret in a layer, no root, and what the doctor says"
new_container "$IMAGE"
inside() { buildah run --user kanyun --volume "$work:/work" "$container" -- entrypoint "$@"; }
buildah inspect --type image "$IMAGE" | grep -q '"User": "kanyun"'
files=$(buildah mount "$container")
[[ ! -e $files/etc/pip.conf ]] || { echo "etc/pip.conf is in the image" >&2 && exit 1; }
buildah umount "$container" >/dev/null
cd "$root"
"$python" jobs/demo/make_raw.py "$work/demo"
"$python" jobs/demo/make_model.py "$work/demo/raw" "$work/demo/model" qwen2_5_vl
chmod -R a+rwX "$work"
inside python -m pipeline doctor /work/demo/raw

echo "== the demo's pipeline, as user $(inside id -un)"
inside python -m pipeline run /opt/kanyun/jobs/recipes/demo.yaml
inside python -m kanyun verify demo/pipeline/packed

echo "== what was planted is what was found"
"$python" - "$work/demo" <<'PYTHON'
import sys
from pathlib import Path

from jobs.demo.result import planted, quarantined

demo = Path(sys.argv[1])
expected, found = planted(demo / "raw"), quarantined(demo / "pipeline")
assert expected == found, (expected, found)
print(f"{len(found)} bad rows, each with its reason")
PYTHON
echo "all of it took $SECONDS s"
