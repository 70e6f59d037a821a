#!/usr/bin/env bash
# Joint training on motion and content with built-in data, then evaluation and
# pictures, on any machine with Python 3.11 to 3.13:
#
#   launch/quickstart.sh [WORKDIR] [--extra=cuda|tpu]
#
# WORKDIR is runs/quickstart in the repository if none is given. Runs on the CPU
# unless an extra or JAX_PLATFORMS says otherwise. launch/environment.sh lists
# the other variables.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

workdir=
group=base
platforms=cpu
for argument in "$@"; do
  case "$argument" in
    --extra=cuda | --extra=tpu)
      group="${argument#--extra=}"
      # JAX keeps host arrays on the second.
      platforms="$group,cpu"
      ;;
    --extra=*) fail "$argument: expected --extra=cuda or --extra=tpu" ;;
    -*) fail "unknown flag $argument (usage: launch/quickstart.sh [WORKDIR] [--extra=cuda|tpu])" ;;
    '') fail "WORKDIR is empty" ;;
    *)
      [[ -z "$workdir" ]] || fail "two work folders: $workdir and $argument"
      workdir="$argument"
      ;;
  esac
done
case "$workdir" in
  '') workdir="$root/runs/quickstart" ;;
  /* | *://*) ;;
  *) workdir="$PWD/$workdir" ;;
esac

prepare_environment "$group"
export JAX_PLATFORMS="${JAX_PLATFORMS:-$platforms}"
cd "$root"
MCJEPA_STARTED="$(date +%s)"  # not when the installation began
export MCJEPA_STARTED
exec "$venv/bin/python" -m mcjepa_jax.main \
  --config=configs/quickstart.py --workdir="$workdir"
