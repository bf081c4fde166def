#!/usr/bin/env bash
# Runs the whole test suite in the project's own environment (made if missing). Arguments go to pytest.
#   bash tests/run.sh                 everything
#   bash tests/run.sh tests/data -x   a part
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../examples/setup_env.sh"
cd "$here/.."
export OMP_NUM_THREADS=1 # tests run side by side: one thread each
exec python -m pytest -n "${TEST_WORKERS:-auto}" --dist worksteal --durations 10 "$@"
