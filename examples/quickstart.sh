#!/usr/bin/env bash
# The whole recipe in miniature: raw text to a Hugging Face model, on a CPU.
#   bash examples/quickstart.sh                     the recipe `quickstart`
#   bash examples/quickstart.sh --set KEY=VALUE     any option of `megatron-r1 run`
# Environment: QUICKSTART_RECIPE another recipe; PYTHON another interpreter; MEGATRON_R1_RUNS where runs go (default: runs/ in the
# checkout); MEGATRON_R1_CACHE where the corpora's packages are kept (default: .cache/ in the checkout).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/setup_env.sh"
export MEGATRON_R1_RUNS="${MEGATRON_R1_RUNS:-$root/runs}"
exec megatron-r1 run "${QUICKSTART_RECIPE:-quickstart}" "$@"
