#!/usr/bin/env bash
# Runs main.py on every host of a Cloud TPU slice, or of several.
#
#   launch/tpu_pod.sh ACTION --name=NAME --zone=ZONE [OPTIONS] [-- ARGUMENTS]
#
#   up       create, wait, copy, mount (with --nfs) and run
#   create   asks for --type=TYPE, as v5litepod-16: a queued resource
#   wait     until it is there
#   copy     this code to all hosts, and installs there what it needs
#   mount    --nfs=ADDRESS:/SHARE as /mnt/mcjepa on all hosts
#   run      starts main.py with ARGUMENTS on all hosts; if it is lost, again
#   logs     follows the log of a host
#   stop     ends main.py with SIGTERM: it saves first
#   delete   gives all back
#
#   --project=PROJECT   if not gcloud's own
#   --slices=N          1; more are one run over the data centre's network
#   --spot              cheaper, and may be taken away at any time
#   --runtime=VERSION   of the TPU software, if not the type's usual one
#   --slice=I --host=I  whose log: 0 and 0
#   --dry-run           prints the commands and does nothing
#
# ARGUMENTS are main.py's; --workdir is a folder that all hosts share, as one
# below /mnt/mcjepa.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/options.sh
source "$root/launch/options.sh"

action="${1:-}"
shift || true
name='' zone='' project='' type='' runtime='' nfs='' spot=''
slices=1 slice=0 host=0
parse name= zone= project= type= runtime= nfs= slices= slice= host= spot \
  -- "$@"
need_number "$slices" --slices

queued() {  # verb, its arguments
  local verb="$1" options=(--zone="$zone")
  shift
  [[ -z "$project" ]] || options+=(--project="$project")
  run gcloud compute tpus queued-resources "$verb" "$name" "${options[@]}" "$@"
}

everywhere() {  # a command for the shells of all hosts
  queued ssh --node=all --worker=all --command="$1"
}

# cloud.google.com/tpu/docs/runtimes
usual_runtime() {
  case "$type" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) fail "--type=$type: its software is not known here: add --runtime=VERSION" ;;
  esac
}

create() {
  need type --type=TYPE
  [[ -n "$runtime" ]] || runtime="$(usual_runtime)"
  local options=(--accelerator-type="$type" --runtime-version="$runtime")
  if ((slices > 1)); then
    options+=(--node-count="$slices" --node-prefix="$name")
  else
    options+=(--node-id="$name")
  fi
  [[ -z "$spot" ]] || options+=(--spot)
  queued create "${options[@]}"
}

# The states are those of cloud.google.com/tpu/docs/queued-resources.
await() {
  local state seen='' unanswered=0
  if [[ -n "$dry_run" ]]; then
    queued describe --format='value(state.state)'
    return
  fi
  while true; do
    # One question in hours of them may go unanswered.
    if ! state="$(queued describe --format='value(state.state)')"; then
      ((++unanswered < 10)) || fail "$name: no answer from gcloud" 1
      sleep 30
      continue
    fi
    unanswered=0
    [[ "$state" == "$seen" ]] || echo "$(date +%T) $name: $state" >&2
    seen="$state"
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED) fail "$name is $state" 1 ;;
    esac
    sleep 30
  done
}

copy() {
  local archive
  archive="${TMPDIR:-/tmp}/mcjepa_jax-$name.tar.gz"
  run tar --create --gzip --file="$archive" --directory="$root" \
    --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=./.cache .
  local options=(--zone="$zone")
  [[ -z "$project" ]] || options+=(--project="$project")
  run gcloud compute tpus queued-resources scp "$archive" \
    "$name:mcjepa_jax.tar.gz" "${options[@]}" --node=all --worker=all
  everywhere 'mkdir -p mcjepa_jax && tar -xzf mcjepa_jax.tar.gz -C mcjepa_jax && mcjepa_jax/launch/install.sh tpu'
}

mount_share() {
  need nfs --nfs=ADDRESS:/SHARE
  # cloud.google.com/filestore/docs/mounting-fileshares
  everywhere "sudo apt-get install -y -q nfs-common && sudo mkdir -p /mnt/mcjepa && { mountpoint -q /mnt/mcjepa || sudo mount $(quoted "$nfs") /mnt/mcjepa; } && sudo chmod a+rwx /mnt/mcjepa"
}

start() {
  need_run
  local command
  command="$(quoted .venv/bin/python -m mcjepa_jax.main "${arguments[@]}")"
  local once="if kill -0 \"\$(cat ../mcjepa.pid 2>&1)\" 2> /dev/null; then echo main.py runs here already: stop it first >&2; exit 1; fi"
  # Apart from the connection, which ends as soon as it runs.
  everywhere "cd mcjepa_jax && { $once; JAX_PLATFORMS=tpu,cpu nohup setsid launch/again.sh $command >> ../mcjepa.log 2>&1 < /dev/null & echo \$! > ../mcjepa.pid; }"
}

case "$action" in
  up | create | wait | copy | mount | run | logs | stop | delete) ;;
  '') usage ;;
  *) wrong "no such action: $action" ;;
esac
need name --name=NAME
need zone --zone=ZONE
case "$action" in
  up)
    need_run
    create
    await
    copy
    [[ -z "$nfs" ]] || mount_share
    start
    ;;
  create) create ;;
  wait) await ;;
  copy) copy ;;
  mount) mount_share ;;
  run) start ;;
  logs)
    queued ssh --node="$slice" --worker="$host" \
      --command='tail -n 100 -f mcjepa.log'
    ;;
  # again.sh passes it on to the process, and not to its group: Grain's workers
  # serve until all is saved.
  stop) everywhere "kill -TERM \"\$(cat mcjepa.pid)\"" ;;
  delete) queued delete --force --quiet ;;
esac
