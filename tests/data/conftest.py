"""No test here may fetch a package: those that need one use what the cache holds, or are skipped."""

import pytest


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("MEGATRON_R1_OFFLINE", "1")
