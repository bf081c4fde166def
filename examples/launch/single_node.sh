#!/usr/bin/env bash
# A published recipe on one machine with several GPUs, one line per stage. Run it again after any interruption: what is
# complete is skipped, a training step goes on from its last checkpoint.
#   DATA_ROOT=/data MODELS_ROOT=/models bash examples/launch/single_node.sh
# Environment: RECIPE (default mobilellm_r1_140m), GPUS (default 8), RUNS (default runs).
set -euo pipefail
recipe="${RECIPE:-mobilellm_r1_140m}"
gpus="${GPUS:-8}"
runs="${RUNS:-runs}"

# Earlier steps are checked by size only: reading terabytes of shards again before every stage would take hours.
one() { megatron-r1 run "$recipe" --runs-dir "$runs" --verify sizes --only "$1"; }
all() { torchrun --standalone --nproc-per-node "$gpus" -m megatron_r1 run "$recipe" --runs-dir "$runs" --verify sizes --only "$1"; }

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
