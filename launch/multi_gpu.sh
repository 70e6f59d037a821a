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

gpus='' arguments=()
while (($#)); do
  case "$1" in
    --gpus=*) gpus="${1#*=}" ;;
    --dry-run) dry_run=yes ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) echo "error: unknown argument $1" >&2; usage ;;
  esac
  shift
done
[[ "$gpus" =~ ^([0-9]+(,[0-9]+)*)?$ ]] \
  || { echo "error: --gpus: expected 0,1,..., got $gpus" >&2; usage; }
need_run "${arguments[@]}"

variables=(JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}")
[[ -z "$gpus" ]] || variables+=(CUDA_VISIBLE_DEVICES="$gpus")
[[ -n "$dry_run" ]] || prepare_environment cuda
# Relative paths among the arguments stay those of this folder.
run env PYTHONPATH="$root" "${variables[@]}" "$venv/bin/python" \
  -m mcjepa_jax.main "${arguments[@]}"
