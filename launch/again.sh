#!/usr/bin/env bash
# Runs a command, and again where it was lost: where it ends with 77, or from
# outside, as by SIGKILL. At most 20 times again; MCJEPA_AGAIN_SECONDS lie between.
#
#   launch/again.sh COMMAND [ARGUMENTS]
#
# SIGTERM is passed on to the command, and nothing follows it.
set -uo pipefail

(($# > 0)) || {
  echo "usage: launch/again.sh COMMAND [ARGUMENTS]" >&2
  exit 2
}

child='' stopped=''
trap 'stopped=1; [[ -z "$child" ]] || kill -TERM "$child" 2> /dev/null' TERM
for ((again = 1; ; again++)); do
  "$@" &
  child=$!
  # A signal ends a wait, and not what is waited for.
  while kill -0 "$child" 2> /dev/null; do
    wait "$child"
  done
  wait "$child"
  code=$?
  if [[ -n "$stopped" ]] || ((again > 20 || code != 77 && code < 128)); then
    exit "$code"
  fi
  echo "again.sh: ended with $code; started again, $again of 20" >&2
  sleep "${MCJEPA_AGAIN_SECONDS:-10}"
  [[ -z "$stopped" ]] || exit "$code"
done
