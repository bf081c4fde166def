"""Student's t against printed tables, Holm and Spearman-Brown by hand, the stretched bootstrap against its variance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_r1.utils.statistics import (
    holm,
    length_for,
    ranks,
    spearman,
    spearman_brown,
    stretch,
    t_cdf,
    t_quantile,
)


@pytest.mark.parametrize(
    ("p", "df", "value"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 3, 3.1824), (0.975, 7, 2.3646), (0.95, 10, 1.8125), (0.995, 30, 2.7500),
     (0.975, 120, 1.9799), (0.975, 200, 1.9719), (0.975, 1000, 1.9623), (0.025, 7, -2.3646)],
)  # fmt: skip
def test_quantiles_of_t_as_printed(p: float, df: int, value: float) -> None:
    assert t_quantile(p, df) == pytest.approx(value, abs=1e-4)
    assert t_cdf(value, df) == pytest.approx(p, abs=2e-5)


def test_series_and_expansion_of_t_meet() -> None:
    for p in (0.9, 0.975, 0.9999):
        assert t_quantile(p, 200) == pytest.approx(t_quantile(p, 201), rel=1e-4)
    assert t_cdf(0.0, 5) == t_cdf(0.0, 500) == 0.5


def test_spearman_brown_and_its_prophecy_are_inverse() -> None:
    assert spearman_brown(0.5, 2) == pytest.approx(2 / 3)
    assert length_for(0.5, 0.9) == pytest.approx(9)
    for r in (0.1, 0.7, 0.95):
        factor = length_for(r, 0.9)
        assert factor is not None
        assert spearman_brown(r, factor) == pytest.approx(0.9)
    assert spearman_brown(None, 2) is None
    assert spearman_brown(-1.0, 2) is None
    assert length_for(0.0, 0.9) is length_for(-0.2, 0.9) is length_for(None, 0.9) is None
    assert length_for(1.0, 0.9) == 0


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_stretch_makes_the_bootstrap_variance_unbiased() -> None:
    """Mean of 5 values: the bootstrap's variance is (n-1)/n of the truth, on average."""
    rng = np.random.default_rng(0)
    raw, wide = [], []
    for _ in range(400):
        values = rng.normal(size=5)
        draws = values[rng.integers(0, 5, (200, 5))].mean(axis=1) - values.mean()
        raw.append(draws.var())
        wide.append((stretch(5, None) * draws).var())
    assert np.mean(raw) == pytest.approx(0.8 / 5, rel=0.1)
    assert np.mean(wide) == pytest.approx(1 / 5, rel=0.1)
    assert stretch(5, 0.95) == pytest.approx(math.sqrt(5 / 4) * 2.7764 / 1.95996, rel=1e-4)
    assert stretch(1, 0.95) == 1.0


def test_ranks_and_spearman() -> None:
    assert ranks(np.array([3.0, 1.0, 1.0, 9.0])).tolist() == [2.0, 0.5, 0.5, 3.0]
    assert spearman(np.arange(4.0), -np.arange(4.0)) == pytest.approx(-1)
    assert spearman(np.ones(4), np.arange(4.0)) is None
    assert spearman(np.arange(2.0), np.arange(2.0)) is None
