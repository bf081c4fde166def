#!/usr/bin/env bash
# MobileLLM-R1-950M as published, on 16 machines with 8 H100 each, under Slurm. First see what it takes:
#   megatron-r1 plan mobilellm_r1_950m --gpus 128 --gpu h100 --price 2.5
#   DATA_ROOT=/data MODELS_ROOT=/models bash examples/launch/mobilellm_r1_950m.sh --partition=gpu --time=24:00:00
set -euo pipefail
: "${DATA_ROOT:?the folder with a sub-folder for each data set}" "${MODELS_ROOT:?the folder with Llama-3.2-1B/tokenizer.json and Llama-3.1-8B-Instruct}"
export DATA_ROOT MODELS_ROOT RECIPE=mobilellm_r1_950m NODES=16 RUNS="${RUNS:-runs}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/slurm/submit.sh" "$@"
