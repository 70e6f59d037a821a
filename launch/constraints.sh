#!/usr/bin/env bash
# Writes constraints.txt: one set of exact versions for Python 3.11 to 3.13, for
# Linux and macOS, with the CUDA extra, from the ranges in the requirement files.
# Versions already there are kept where the ranges allow; --upgrade renews all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

header='# The exact versions that are tested; written by launch/constraints.sh.'
# uv is what the launch scripts install with.
extras="$(printf '%s\n' 'jax[cuda12] ; sys_platform == "linux"' uv)"
grep -v '^#' constraints.txt > constraints.tmp || true
trap 'rm -f constraints.tmp' EXIT
uv pip compile --quiet --universal --python-version 3.11 --no-header \
  --no-annotate --output-file constraints.tmp "$@" \
  requirements.txt requirements-dev.txt - <<< "$extras"
others="== '(win32|emscripten)'\$"
{ echo "$header"; grep -v -E "$others" constraints.tmp; } > constraints.txt
