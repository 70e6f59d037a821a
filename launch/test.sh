#!/usr/bin/env bash
# Lint, layout, layers, all tests but the proofs: launch/test.sh [pytest arguments]
# The fast tests alone: launch/test.sh -m 'not slow'
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment dev
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
cd "$root"
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m pyink --check --quiet .
"$venv/bin/python" -m pytest -q tests/layers_test.py
"$venv/bin/python" -m pytest "$@"
