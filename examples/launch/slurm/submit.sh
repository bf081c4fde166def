#!/usr/bin/env bash
# A published recipe as a chain of Slurm jobs, one line per stage. A run folder belongs to one job at a time, so each job
# waits for the one before it.
#   DATA_ROOT=/data MODELS_ROOT=/models NODES=16 bash examples/launch/slurm/submit.sh --time=24:00:00
# Environment: RECIPE (default mobilellm_r1_140m), NODES for training steps (default 16), RUNS on a shared file system
# (default runs). Everything on the command line is handed to sbatch: partition, account, time limit.
# Submit again after a failure: complete stages end in seconds.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
options=("$@")
last=""

submit() { # single nodes step
  last="$(sbatch --parsable --job-name "r1-$3" --nodes "$2" ${last:+--dependency="afterok:$last"} \
    --export=ALL,STEP="$3",SINGLE="$1" "${options[@]}" "$here/step.sbatch")"
  echo "$3: job $last"
}
one() { submit 1 1 "$1"; }
all() { submit 0 "${NODES:-16}" "$1"; }

one corpus_pretrain
one mix_pretrain1
all pretrain1
one mix_pretrain2
all pretrain2
one corpus_midtrain
one mix_midtrain1
all midtrain1
one mix_midtrain2
all midtrain2
one corpus_sft_general
all sft_general
one corpus_sft_reasoning
all sft_reasoning
one eval_base
one eval_final
one export_base
one export
one report
