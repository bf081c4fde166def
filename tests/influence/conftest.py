"""Fixtures of the influence tests: the small world is built once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("probe", "distributed", "mixture"))]

import small_world  # noqa: E402

from megatron_r1.artifacts.base import Artifact  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Shards, probe and checkpoints, by the names influence knows them."""
    folder = tmp_path_factory.mktemp("world")
    shards = small_world.small_shards(folder)
    probe = small_world.small_probe(folder, shards)
    return {"shards": shards, "probe": probe, "checkpoint": small_world.small_checkpoint(folder, shards)}
