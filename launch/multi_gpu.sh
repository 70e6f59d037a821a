#!/usr/bin/env bash
# Runs main.py on the GPUs of this machine, all of them in one process.
#
#   launch/multi_gpu.sh [--gpus=0,1,...] [--dry-run] -- ARGUMENTS
#
#   --gpus=LIST   numbers of the GPUs to use; all if not given
#   --dry-run     prints the command and does nothing
#
# ARGUMENTS are main.py's. Several machines without a scheduler are one run with
# --coordinator=HOST:PORT --processes=N --process=I among them, on each its own.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/options.sh
source "$root/launch/options.sh"

gpus=''
parse gpus= -- "$@"
[[ "$gpus" =~ ^([0-9]+(,[0-9]+)*)?$ ]] \
  || wrong "--gpus: expected 0,1,..., got $gpus"
need_run

variables=(JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}")
[[ -z "$gpus" ]] || variables+=(CUDA_VISIBLE_DEVICES="$gpus")
[[ -n "$dry_run" ]] || prepare_environment cuda
# Relative paths among the arguments stay those of this folder.
run env PYTHONPATH="$root" "${variables[@]}" "$venv/bin/python" \
  -m mcjepa_jax.main "${arguments[@]}"
