#!/usr/bin/env bash
# A recipe as a chain of Slurm jobs, one for each step. A run folder belongs to one job at a time, so each job waits for the one
# before it; a job that is requeued keeps the others waiting.
#   DATA_ROOT=/data MODELS_ROOT=/models NODES=16 bash examples/launch/slurm/submit.sh --time=24:00:00
# Environment: RECIPE (default mobilellm_r1_140m), NODES for training and influence (default 16), RUNS on a shared file system (default runs),
# and what step.sbatch reads. Everything on the command line is handed to sbatch: partition, account, time limit.
# When a step fails, the jobs behind it are cancelled. Submit again: complete steps end in seconds.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if ! [[ "${NODES:-16}" =~ ^[1-9][0-9]*$ ]]; then
  echo "NODES is the number of machines for training and influence, 1 or more; found: $NODES" >&2
  exit 2
fi
steps="$(megatron-r1 steps "${RECIPE:-mobilellm_r1_140m}")"
last=""

while read -r step stage processes; do
  case "$stage $processes" in
    "train many" | "influence many") single=0 nodes="${NODES:-16}" ;;
    *many) single=0 nodes=1 ;; # a judge of probe documents, for example: the GPUs of one machine
    *) single=1 nodes=1 ;;
  esac
  last="$(sbatch --parsable --job-name "r1-$step" --nodes "$nodes" --kill-on-invalid-dep=yes ${last:+--dependency="afterok:${last%%;*}"} \
    --export=ALL,STEP="$step",SINGLE="$single",LAUNCH="$here" "$@" "$here/step.sbatch" < /dev/null)"
  echo "$step: job ${last%%;*}"
done <<< "$steps"
