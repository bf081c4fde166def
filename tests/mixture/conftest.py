"""Fixtures of the mixture tests: influence tables written by hand."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), *(str(Path(__file__).parents[1] / name) for name in ("probe", "distributed"))]
