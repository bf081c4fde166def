"""Fixtures of the train tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Toy shards: alpha, beta, gamma (text) and chat, 512-token vocabulary."""
    from train_toys import make_shards

    return make_shards(tmp_path_factory.mktemp("corpus"))
