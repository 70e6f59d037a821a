# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh, for the functions below.
#
#   PYTHON        the interpreter to build on; else the first of python3.11,
#                 python3.12, python3.13, python3 that is 3.11 to 3.13
#   MCJEPA_VENV   the virtual environment; else .venv in the repository
#   pip's own settings (PIP_FIND_LINKS, PIP_INDEX_URL, pip.conf) hold.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${MCJEPA_VENV:-$root/.venv}"

fail() {  # message [exit code]
  echo "error: $1" >&2
  exit "${2:-2}"
}

supported() {  # interpreter
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
    > /dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    supported "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 to 3.13"
    python="$PYTHON"
    return
  fi
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    # A name on PATH may be a version manager's stub that fails: it is tried.
    if supported "$candidate"; then
      python="$candidate"
      return
    fi
  done
  fail "found no Python 3.11 to 3.13 (install one, or set PYTHON to it)"
}

make_venv() {
  local python
  find_python
  if [[ -e "$venv" && ! -f "$venv/pyvenv.cfg" ]] \
    && [[ -n "$(ls -A "$venv" 2>&1)" ]]; then
    # --clear would empty it.
    fail "$venv is there and is no virtual environment"
  fi
  "$python" -m venv --clear "$venv" >&2 || fail \
    "$python -m venv $venv failed (Debian and Ubuntu: apt install python3-venv)"
}

usable_venv() {
  supported "$venv/bin/python" && { [[ -z "${PYTHON:-}" ]] \
    || [[ "$("$venv/bin/python" -V)" == "$("$PYTHON" -V 2>&1)" ]]; }
}

pip_install() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/constraints.txt" "$@"
}

uv_install() {
  # uv reads its own variables, not pip's; find-links are split by commas there.
  local links="${PIP_FIND_LINKS:-}"
  export UV_FIND_LINKS="${UV_FIND_LINKS:-${links// /,}}"
  export UV_INDEX="${UV_INDEX:-${PIP_EXTRA_INDEX_URL:-}}"
  [[ -z "${PIP_INDEX_URL:-}" ]] \
    || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
  # Compiled here by all cores, not by the first import: seconds of every start.
  local arguments=(--compile-bytecode --python "$venv/bin/python")
  [[ -t 2 ]] || arguments+=(--quiet)
  "$venv/bin/python" -m uv pip install "${arguments[@]}" \
    --constraint "$root/constraints.txt" "$@"
}

# Makes $venv hold one group of packages: base, or that and dev, cuda or tpu.
# Does nothing where they stand. Exports the seconds that it took.
prepare_environment() {  # group
  local start=$SECONDS group="$1" stamp
  local files=("$root/requirements.txt")
  [[ "$group" != dev ]] || files+=("$root/requirements-dev.txt")
  stamp="$(cat "${files[@]}" "$root/constraints.txt" | cksum)"
  usable_venv || make_venv
  if [[ "$(cat "$venv/installed-$group" 2> /dev/null)" != "$stamp" ]]; then
    echo "installing into $venv" >&2
    local packages=(--requirement "$root/requirements.txt")
    case "$group" in
      dev) packages+=(--requirement "$root/requirements-dev.txt") ;;
      cuda) packages+=("jax[cuda12]") ;;
      tpu) packages+=("jax[tpu]") ;;
    esac
    # By pip, whose settings (an extra index, find-links) may name a CPU build
    # of torch, many times smaller.
    [[ "$group" != dev ]] || pip_install --no-deps torch \
      || fail "could not install torch" 1
    if ! { pip_install uv && uv_install "${packages[@]}"; }; then
      echo "uv could not install this; pip is slower" >&2
      pip_install "${packages[@]}" || fail "could not install the packages" 1
    fi
    echo "$stamp" > "$venv/installed-$group"
  fi
  export MCJEPA_INSTALL_SECONDS=$((SECONDS - start))
}
