#!/usr/bin/env bash
# Runs a command, and again where it was lost: where it ends with 77, or from
# outside, as by SIGKILL, and then also with 2. At most 20 times again;
# MCJEPA_AGAIN_SECONDS, 10, lie between.
#
#   launch/again.sh COMMAND [ARGUMENTS]
#
# SIGTERM and Ctrl-C are passed on to the command as SIGTERM, and nothing follows.
set -uo pipefail

(($# > 0)) || {
  echo "usage: launch/again.sh COMMAND [ARGUMENTS]" >&2
  exit 2
}

child='' stopped='' lost=''
stop() {
  stopped=1
  [[ -z "$child" ]] || kill -TERM "$child" 2> /dev/null
}
# What runs in the background hears no Ctrl-C of its own.
trap stop TERM INT
for ((again = 1; ; again++)); do
  "$@" &
  child=$!
  [[ -z "$stopped" ]] || kill -TERM "$child" 2> /dev/null
  # A signal ends a wait, and not what is waited for.
  while kill -0 "$child" 2> /dev/null; do
    wait "$child"
  done
  wait "$child"
  code=$?
  child=''
  if ((code == 77 || code >= 128 && code != 130)); then
    lost=1
  elif [[ -z "$lost" ]] || ((code != 2)); then # what it needs may be away
    exit "$code"
  fi
  [[ -z "$stopped" ]] && ((again <= 20)) || exit "$code"
  echo "again.sh: ended with $code; started again, $again of 20" >&2
  # By seconds: a signal just before a longer sleep would wait for its end.
  for ((left = ${MCJEPA_AGAIN_SECONDS:-10}; left > 0; left--)); do
    [[ -z "$stopped" ]] || break
    sleep 1
  done
  [[ -z "$stopped" ]] || exit "$code"
done
