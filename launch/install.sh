#!/usr/bin/env bash
# Installs what a run needs into .venv: launch/install.sh [base|cuda|tpu]
#
# Where no Python 3.11 to 3.13 is found (Ubuntu 22.04 has 3.10), uv brings one.
# launch/environment.sh lists the variables that this reads.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

group="${1:-base}"
case "$group" in
  base | cuda | tpu) ;;
  *) fail "$group: expected base, cuda or tpu" ;;
esac
if [[ -z "${PYTHON:-}" ]] && ! (find_python) 2> /dev/null; then
  python3 -m pip install --quiet --user uv
  uv="$(python3 -m site --user-base)/bin/uv"
  "$uv" python install 3.12
  PYTHON="$("$uv" python find 3.12)"
  export PYTHON
fi
prepare_environment "$group"
echo "$venv holds the $group packages" >&2
