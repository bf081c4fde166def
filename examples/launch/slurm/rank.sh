#!/usr/bin/env bash
# One process of a Slurm step: what torch wants to know, from what Slurm says; then the command given. Slurm starts one for each GPU.
# There is no torchrun in between: it would turn the exit status that asks for a requeue into 1, and give its processes 30 seconds
# after SIGTERM, which is less than a checkpoint may take.
set -euo pipefail
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # as torchrun does it; unset, each process would start a thread for every core
exec "$@"
