"""Errors, seeds, progress."""

from __future__ import annotations

import pickle

import pytest

from megatron_r1.utils.errors import ConfigError, R1Error
from megatron_r1.utils.logging import duration, human, progress
from megatron_r1.utils.seeding import derive_seed, generator


def test_errors_have_three_parts_and_survive_pickling() -> None:
    error = ConfigError(expected="a", found="b", fix="c")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, R1Error)
    assert (again.expected, again.found, again.fix) == ("a", "b", "c")
    assert str(again) == "expected: a\n   found: b\n      do: c"


def test_seeds_are_pure_and_distinct() -> None:
    assert derive_seed(1, "data", 3) == 4498379822376951031  # a stored value: another machine or release must agree
    seeds = {derive_seed(seed, name, index) for seed in range(5) for name in ("a", "b") for index in range(5)}
    assert len(seeds) == 50
    assert derive_seed(1, "1") != derive_seed(1, 1)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert generator(1, "x").random() == generator(1, "x").random()


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (1234567, "1.23M"), (4.2e12, "4.2T")])
def test_human(number: float, text: str) -> None:
    assert human(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (75, "1m15s"), (3700, "1h01m")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_counts() -> None:
    with progress("label", 10, enabled=False) as bar:
        for _ in range(5):
            bar.advance(2)
        bar.note(loss=1.0, what="x")
        assert bar.done == 10
        assert "loss 1" in bar.notes
