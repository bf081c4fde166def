#!/usr/bin/env bash
# One training step on several machines with torchrun. All of them must see the same runs folder.
# On every machine, with its own NODE_RANK (0 on the machine HEAD names):
#   NODES=4 NODE_RANK=0 HEAD=10.0.0.1 bash examples/launch/multi_node.sh pretrain1
# STEP may be `doctor`: then it is checked whether the machines can train together. The steps that are not training run on one
# machine, as one process, before it:
#   megatron-r1 run mobilellm_r1_140m --verify sizes --until mix_pretrain1
# Environment: RECIPE (default mobilellm_r1_140m), GPUS per machine (default 8), RUNS (default runs), PORT (default 29500), RESTARTS:
# how often the processes are started again after one has died (default 3; they go on from the last checkpoint).
set -euo pipefail
step="${1:?name the training step, for example: bash examples/launch/multi_node.sh pretrain1}"
: "${NODES:?set NODES to the number of machines}" "${NODE_RANK:?set NODE_RANK to 0, 1, ... on each machine}" "${HEAD:?set HEAD to the address of machine 0}"

if [ "$step" = doctor ]; then
  arguments=(doctor --cluster --runs-dir "${RUNS:-runs}")
else
  arguments=(run "${RECIPE:-mobilellm_r1_140m}" --runs-dir "${RUNS:-runs}" --verify sizes --only "$step")
fi
# A new store for every restart: in a shared one the processes would look for each other under the number of restarts, which the
# machines count differently when the processes of one die and those of another only hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds after SIGTERM in which a step is finished and saved; by itself torchrun kills after 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
exec torchrun \
  --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "${GPUS:-8}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-id "megatron-r1-$step" --rdzv-endpoint "$HEAD:${PORT:-29500}" \
  -m megatron_r1 "${arguments[@]}"
