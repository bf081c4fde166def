#!/usr/bin/env bash
# A recipe on one machine with several GPUs, one line per step. Run it again after any interruption: what is complete is
# skipped, a training step goes on from its last checkpoint.
#   DATA_ROOT=/data MODELS_ROOT=/models bash examples/launch/single_node.sh
# Environment: RECIPE (default mobilellm_r1_140m), GPUS (default 8), RUNS (default runs), RESTARTS: how often torchrun starts the
# processes of a step again after one has died (default 3).
set -euo pipefail
recipe="${RECIPE:-mobilellm_r1_140m}"
runs="${RUNS:-runs}"
# Seconds after SIGTERM in which a step is finished and saved; by itself torchrun kills after 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600

# Earlier steps are checked by size only: reading terabytes of shards again before every step would take hours.
one() { megatron-r1 run "$recipe" --runs-dir "$runs" --verify sizes --only "$1"; }
all() {
  torchrun --standalone --nproc-per-node "${GPUS:-8}" --max-restarts "${RESTARTS:-3}" \
    -m megatron_r1 run "$recipe" --runs-dir "$runs" --verify sizes --only "$1"
}

torchrun --standalone --nproc-per-node "${GPUS:-8}" -m megatron_r1 doctor --cluster --runs-dir "$runs" # can these GPUs train together?
steps="$(megatron-r1 steps "$recipe")"
while read -r step _ processes; do
  case "$processes" in
    many) all "$step" < /dev/null ;; # the loop's list is not theirs to read
    *) one "$step" < /dev/null ;;
  esac
done <<< "$steps"
