#!/usr/bin/env bash
# Runs the whole test suite in the project's own environment (made if missing). Arguments go to pytest.
#   bash tests/run.sh                 everything
#   bash tests/run.sh tests/data -x   a part
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../examples/setup_env.sh"
cd "$here/.."
python - <<'PY' # tests themselves never fetch: those that need a package look into the cache, or are skipped and say so
import sys
from megatron_r1.data.packages import PACKAGES, fetch
from megatron_r1.utils.errors import EnvironmentProblem
for name in PACKAGES:
    try:
        fetch(name)
    except EnvironmentProblem as problem:
        print(f"[tests] without {name}, tests that need it are skipped\n{problem}", file=sys.stderr)
PY
export OMP_NUM_THREADS=1 # tests run side by side: one thread each
exec python -m pytest -n "${TEST_WORKERS:-auto}" --dist worksteal --durations 10 "$@"
