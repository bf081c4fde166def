#!/usr/bin/env bash
# A corpus step of a recipe as Slurm job arrays, one for each phase of the stage, through datatrove (pip install datatrove).
#   DATA_ROOT=/data STEP=corpus_pretrain RANKS=200 PARTITION=cpu bash examples/launch/slurm/preprocess.sh
# Environment: RECIPE (default mobilellm_r1_140m), STEP, RANKS (cores that share the work), PARTITION, TIME (default 24:00:00),
# ACTIVATE (what makes this environment on a node), RUNS (default runs) on a file system all nodes share: nothing else is needed.
# Submit again after a failure: what is done is not done again. Then the step itself ends in minutes, on one node:
#   sbatch --export=ALL,STEP=corpus_pretrain,SINGLE=1 examples/launch/slurm/step.sbatch
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
exec python "$here/tools/preprocess_cluster.py" "${RECIPE:-mobilellm_r1_140m}" --step "${STEP:?name the corpus step}" --runs-dir "${RUNS:-runs}" \
  --executor slurm --ranks "${RANKS:?how many cores share the work}" --partition "${PARTITION:?name the partition}" --time "${TIME:-24:00:00}" \
  ${ACTIVATE:+--env-command "$ACTIVATE"}
