"""Shared fixtures of the evaluate tests."""

from __future__ import annotations

import pytest
from evaluate_fakes import ByteTokenizer, FakeSubject

from megatron_r1.evaluate.task import Bench


@pytest.fixture
def make_bench():
    def make(subject=None, shards=None, **changes):
        return Bench(subject=subject or FakeSubject(), tokenizer=ByteTokenizer(), shards=shards, seed=3, bootstrap=200, stop_ids=(256, 257), **changes)

    return make
