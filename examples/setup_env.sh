#!/usr/bin/env bash
# Makes (or completes) the virtual environment in .venv, builds the kernels of csrc/ where that is possible, and puts the
# environment on PATH. Source it from the project's scripts:
#   source examples/setup_env.sh
# Environment: PYTHON=python3.12 another interpreter; VENV=folder another place; OMP_NUM_THREADS threads a process;
# MEGATRON_R1_BUILD_EXT=0 no kernels, =1 kernels or an error; MEGATRON_R1_BUILD_CUDA=1 CUDA kernels also where no GPU is visible,
# =0 none.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$root/.venv}"
lock="$root/requirements/cpu.txt"

say() { printf '%s\n' "[setup] $*" >&2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  say "expected: Python 3.11 or newer"
  say "   found: none of: ${PYTHON:-python3.11 python3 python}"
  say "      do: install Python 3.11, or name one: PYTHON=/path/to/python bash ..."
  return 1
}

stamp_of() { # what the environment was made from
  "$1" - "$lock" "$root/setup.py" "$root/requirements/core.txt" <<'PY'
import hashlib, sys
digest = hashlib.sha256(sys.version.encode())
for path in sys.argv[1:]:
    digest.update(open(path, "rb").read())
print(digest.hexdigest()[:16])
PY
}

python="$(find_python)"
stamp="$(stamp_of "$python")"
if [ ! -f "$venv/.complete-$stamp" ]; then
  began=$SECONDS
  say "making $venv with $("$python" --version) (about a minute and 1.6 GB; once)"
  [ -x "$venv/bin/python" ] && [ "$("$venv/bin/python" --version 2>/dev/null)" = "$("$python" --version)" ] || rm -rf "$venv"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  say "installing the pinned packages of requirements/cpu.txt"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$lock"
  say "installing megatron_r1 itself"
  MEGATRON_R1_BUILD_EXT=0 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e "$root"
  rm -f "$venv"/.complete-*
  touch "$venv/.complete-$stamp"
  say "environment ready after $((SECONDS - began)) s"
else
  say "environment $venv is complete"
fi
# Compiles only what changed since the last time; says what was built, or why nothing was (everything runs without, slower).
"$venv/bin/python" "$root/tools/build_csrc.py" --optional --cuda visible >&2

export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
export MEGATRON_R1_CACHE="${MEGATRON_R1_CACHE:-$root/.cache}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$("$venv/bin/python" -c 'from megatron_r1.utils.machine import usable_cores; print(min(usable_cores(), 8))')}"
