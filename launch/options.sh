# shellcheck shell=bash
# Sourced by the scripts that start runs elsewhere, after environment.sh.

dry_run='' arguments=()

usage() {  # the comment at the head of the script
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0" >&2
  exit 2
}

wrong() {  # message
  echo "error: $1" >&2
  usage
}

# Sets for --NAME=VALUE the variable NAME, for --NAME to yes, and `arguments` to
# what follows --, which is main.py's.
parse() {  # the flags, as NAME= or as NAME if they take no value, --, the words
  local known=' dry-run ' flag
  while [[ "$1" != -- ]]; do
    known+="$1 "
    shift
  done
  shift
  while (($#)); do
    flag="${1#--}"
    case "$1" in
      --)
        shift
        arguments=("$@")
        return
        ;;
      --*=*) flag="${flag%%=*}=" ;;
    esac
    [[ "$1" == --* && "$known" == *" $flag "* ]] || wrong "unknown argument $1"
    case "$flag" in
      *=) printf -v "${flag%=}" %s "${1#*=}" ;;
      *) printf -v "${flag//-/_}" yes ;;
    esac
    shift
  done
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
  [[ -n "${!1}" ]] || wrong "$2 is missing"
}

need_number() {  # value, what it is given as
  [[ "$1" =~ ^[1-9][0-9]*$ ]] || wrong "$2: expected a number, got $1"
}

# What main.py cannot do without, before anything is asked for elsewhere.
need_run() {
  local argument found=
  # Of an empty array, bash before 4.4 says that it is not set.
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    case "$argument" in
      --config=?*) found="${found}c" ;;
      --workdir=?*) found="${found}w" ;;
    esac
  done
  [[ "$found" == *c* ]] || wrong "-- --config=FILE.py is missing"
  [[ "$found" == *w* ]] || wrong "-- --workdir=FOLDER is missing"
}
