#!/usr/bin/env bash
# Submits main.py to SLURM, a process for each GPU of some nodes.
#
#   launch/slurm.sh --nodes=N --gpus=N [OPTIONS] -- ARGUMENTS
#
#   --gpus=N            of a node
#   --cpus=N            of a process, 8: Grain's workers need them
#   --time=TIME         limit, as SLURM has it; 2 minutes before, main.py saves
#   --partition=NAME, --account=NAME, --name=NAME
#   --dry-run           prints the job and submits nothing
#
# ARGUMENTS are main.py's; .venv (launch/install.sh cuda), data and --workdir
# are in folders that all nodes share. A job that is preempted is queued again
# and goes on; so is one that was lost (77, or a task was killed), 20 times at
# most, counted in mcjepa-JOB.lost. One that scancel ends is not.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/options.sh
source "$root/launch/options.sh"

nodes='' gpus='' cpus=8 name=mcjepa time=24:00:00 partition='' account=''
parse nodes= gpus= cpus= name= time= partition= account= -- "$@"
need nodes --nodes=N
need gpus --gpus=N
need_number "$nodes" --nodes
need_number "$gpus" --gpus
need_number "$cpus" --cpus
need_run

# JAX reads its place from srun's variables: a task is a process with the GPU of
# its number on the node. SIGTERM goes to the tasks, not to this script. They notice
# each other's end: srun is not to kill one that still saves. Nor does it take
# sbatch's --cpus-per-task for its own.
job="#!/usr/bin/env bash
export PYTHONPATH=$(quoted "$root") JAX_PLATFORMS=cuda,cpu
code=0
srun --kill-on-bad-exit=0 --cpus-per-task=$cpus \\
  $(quoted "$venv/bin/python" -m mcjepa_jax.main "${arguments[@]}") || code=\$?
# Lost: 77 of those that saw one end, the code of the one that was killed; after
# that also 2, where what it needs is away still.
lost=\"mcjepa-\$SLURM_JOB_ID.lost\"
again=\$(( code == 75 ))
if (( code == 77 || code >= 128 && code != 130 )) || [[ \$code == 2 && -s \$lost ]]; then
  if echo \"\$code\" >> \"\$lost\"; then
    again=\$(( \$(wc -l < \"\$lost\") <= 20 ))
  fi
fi
# Of a job that scancel ends, too, main.py saves and ends with 75.
case \"\$(squeue --noheader --jobs=\"\$SLURM_JOB_ID\" --format=%T)\" in
  COMPLETING | CANCELLED) again=0 ;;
esac
[[ \$again == 0 ]] || scontrol requeue \"\$SLURM_JOB_ID\"
(( code )) || rm -f \"\$lost\"
exit \$code"

submit=(sbatch --job-name="$name" --nodes="$nodes"
  --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --cpus-per-task="$cpus"
  --time="$time" --signal=TERM@120 --requeue --open-mode=append
  --output="$name-%j.log")
[[ -z "$partition" ]] || submit+=(--partition="$partition")
[[ -z "$account" ]] || submit+=(--account="$account")
run "${submit[@]}" <<< "$job"
[[ -z "$dry_run" ]] || echo "$job"
