#!/usr/bin/env bash
# Make .venv with the exact versions of constraints.txt, and see that Java 17 or 21 is there. `make setup` calls this once.
# usage: jobs/setup.sh
# example: jobs/setup.sh && source .venv/bin/activate
set -euo pipefail
source "$(dirname "$0")/common.sh"
need 0 "$@"
cd "$root"

# Prints the first Python 3.12 or 3.13 that really runs (a pyenv shim may exist without its version).
find_python() {
  local candidate
  for candidate in python3.12 python3.13 python3 ~/.pyenv/versions/3.12*/bin/python3.12 ~/.pyenv/versions/3.13*/bin/python3.13; do
    if "$candidate" -c 'import ensurepip, sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# Major version of the java that Spark will start, 0 if there is none.
java_version() {
  "${JAVA_HOME:+$JAVA_HOME/bin/}java" -version 2>&1 | sed -nE 's/.*version "([0-9]+).*/\1/p' | grep . || echo 0
}

# All that is missing is said before anything is installed.
missing=0
if ! python=$(find_python); then
  echo "Python 3.12 or 3.13 with venv is missing: install one (Debian: apt-get install python3-venv; or pyenv install 3.12)" >&2
  missing=1
fi
java=$(java_version)
may_install=0
[[ $(id -u) != 0 || -n ${JAVA_HOME:-} ]] || ! command -v apt-get >/dev/null || may_install=1
if ((java < 17)) && ((missing || !may_install)); then
  found=$([[ $java == 0 ]] && echo "there is none" || echo "found is $java")
  echo "Java 17 or 21 is missing, which Spark needs; $found: install it (Debian: apt-get install default-jre-headless)" >&2
  missing=1
fi
((missing == 0)) || exit 2

if ((java < 17)); then
  call apt-get update
  # Debian 12 has 17, Debian 13 only 21.
  for jre in openjdk-17-jre-headless openjdk-21-jre-headless; do
    call env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$jre" && break
  done
fi

if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
  echo "making .venv with $("$python" --version)" >&2
  call "$python" -m venv --clear .venv
fi
run .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
