# shellcheck shell=bash
# Sourced by the scripts that start runs elsewhere, after environment.sh.

dry_run=

usage() {  # the comment at the head of the script
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0" >&2
  exit 2
}

run() {  # command: done, or with --dry-run printed as a shell would read it
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

quoted() {  # arguments, as a shell elsewhere is to read them
  local text
  printf -v text '%q ' "$@"
  echo "${text% }"
}

need() {  # name of a variable, its flag
  [[ -n "${!1}" ]] || { echo "error: $2 is missing" >&2; usage; }
}

# What main.py cannot do without, before anything is asked for elsewhere.
need_run() {  # arguments of main.py
  local argument found=
  for argument in "$@"; do
    case "$argument" in
      --config=?*) found="${found}c" ;;
      --workdir=?*) found="${found}w" ;;
    esac
  done
  [[ "$found" == *c* ]] || { echo "error: -- --config=FILE.py is missing" >&2; usage; }
  [[ "$found" == *w* ]] || { echo "error: -- --workdir=FOLDER is missing" >&2; usage; }
}
