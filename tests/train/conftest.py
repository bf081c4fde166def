"""Fixtures of the train tests."""

import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Toy shards: alpha, beta, gamma (text) and chat, 512-token vocabulary."""
    from train_toys import make_shards

    return make_shards(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def probe(shards, tmp_path_factory):
    """Probe sets `code` and `math` of the toy shards."""
    from train_toys import make_probe

    return make_probe(tmp_path_factory.mktemp("probe"), shards)


@pytest.fixture(scope="session")
def straight(shards, tmp_path_factory):
    """The run every interrupted one must equal."""
    from train_toys import resumable, train

    return train(tmp_path_factory.mktemp("straight"), resumable(), shards=shards)


@pytest.fixture
def messages():
    """What the package logs during the test (its logger does not propagate)."""
    from megatron_r1.utils.logging import get_logger

    get_logger("train")
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    handler = Collect()
    logging.getLogger("megatron_r1").addHandler(handler)
    yield found
    logging.getLogger("megatron_r1").removeHandler(handler)
