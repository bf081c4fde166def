"""Intervals against scipy-free oracles: exact binomial coverage, closed forms, and scaling laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.evaluate.intervals import bootstrap_mean, bootstrap_ratio, wilson

# From the closed form evaluated by hand with 50 digits (mpmath): z = 1.959963984540054.
KNOWN = [(0, 10, 0.0, 0.2775327998628892), (5, 10, 0.2365930905125640, 0.7634069094874360), (10, 10, 0.7224672001371108, 1.0)]


@pytest.mark.parametrize(("k", "n", "low", "high"), KNOWN)
def test_known_values(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-12)


def test_no_items_means_no_knowledge():
    assert wilson(0, 0) == (0.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_bounds_solve_the_score_equation(pair):
    """Each bound p satisfies |k/n - p| = z sqrt(p(1-p)/n): the definition, not the formula."""
    k, n = pair
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for bound in (low, high):
        assert abs(k / n - bound) == pytest.approx(1.959963984540054 * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


@pytest.mark.parametrize(("n", "p"), [(40, 0.25), (160, 0.25), (48, 0.05)])
def test_coverage_is_near_95_percent(n, p):
    """Exact, by summing the binomial distribution."""
    covered = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if wilson(k, n)[0] <= p <= wilson(k, n)[1])
    assert 0.92 < covered < 0.985


def test_bootstrap_matches_the_normal_interval_for_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = bootstrap_mean(values, 4000, np.random.default_rng(1))
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_bootstrap_of_a_constant_ratio_has_no_width():
    sizes = np.array([1.0, 7.0, 30.0])
    low, high = bootstrap_ratio(2.5 * sizes, sizes, 200, np.random.default_rng(0))
    assert low == pytest.approx(2.5)
    assert high == pytest.approx(2.5)


def test_bootstrap_is_deterministic_and_needs_units():
    a = bootstrap_ratio(np.arange(9.0), np.ones(9), 500, np.random.default_rng(5))
    assert a == bootstrap_ratio(np.arange(9.0), np.ones(9), 500, np.random.default_rng(5))
    with pytest.raises(ValueError, match="at least one unit"):
        bootstrap_ratio(np.empty(0), np.empty(0), 100, np.random.default_rng(0))
