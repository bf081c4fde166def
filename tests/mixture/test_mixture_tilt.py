"""Weights regularised towards the natural shares: the closed form, the bounds, and independent oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.mixture.weights import Bounds, boxed, divergence, effective_sources, natural, share, tilt
from megatron_r1.utils.errors import ConfigError, DataError

PROPERTIES = settings(max_examples=150, deadline=None)
NAMES = tuple("abcdef")
worlds = st.integers(2, 6).flatmap(
    lambda k: st.tuples(
        st.lists(st.floats(-3, 3), min_size=k, max_size=k),
        st.lists(st.integers(10, 10_000), min_size=k, max_size=k),
        st.floats(0.05, 20),
    )
)


def world(rho: list[float], counts: list[int]) -> tuple[dict[str, float], dict[str, int]]:
    return dict(zip(NAMES, rho)), dict(zip(NAMES, counts))


def free(tokens: dict[str, int]) -> Bounds:
    return Bounds.of(tokens, 0.0, set(), None, None)


def objective(weights: dict[str, float], rho: dict[str, float], shares: dict[str, float], tau: float) -> float:
    return sum(weights[n] * rho[n] for n in rho) - tau * divergence(weights, shares)


@PROPERTIES
@given(worlds)
def test_without_bounds_it_is_the_closed_form(drawn: tuple) -> None:
    rho, tokens = world(*drawn[:2])
    shares, tau = natural(tokens), drawn[2]
    raised = {n: math.log(shares[n]) + rho[n] / tau for n in rho}
    top = max(raised.values())
    total = sum(math.exp(value - top) for value in raised.values())
    expected = {n: math.exp(value - top) / total for n, value in raised.items()}
    assert tilt(shares, rho, tau, free(tokens)) == pytest.approx(expected, abs=1e-12)


@PROPERTIES
@given(worlds, st.floats(0, 0.15), st.floats(1.05, 3), st.integers(0, 2**32 - 1))
def test_no_feasible_move_is_better(drawn: tuple, floor: float, epochs: float, seed: int) -> None:
    """Optimality of a concave problem: no small shift of mass between two sources gains anything."""
    rho, tokens = world(*drawn[:2])
    shares, tau = natural(tokens), drawn[2]
    bounds = Bounds.of(tokens, floor, set(), sum(tokens.values()), epochs)
    weights = tilt(shares, rho, tau, bounds)
    assert math.fsum(weights.values()) == pytest.approx(1, abs=1e-12)
    assert all(bounds.low[n] - 1e-12 <= w <= bounds.high[n] + 1e-12 for n, w in weights.items())
    best = objective(weights, rho, shares, tau)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        a, b = rng.choice(list(rho), 2, replace=False)
        step = min(10.0 ** rng.uniform(-6, -1), bounds.high[a] - weights[a], weights[b] - bounds.low[b])
        if step > 0:
            moved = {**weights, a: weights[a] + step, b: max(weights[b] - step, 0.0)}
            assert objective(moved, rho, shares, tau) <= best + 1e-9 * (1 + abs(best))


def test_equals_projected_ascent() -> None:
    """Oracle of another kind: exponentiated gradient ascent with clamping by bisection, 4000 steps."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        rho, tokens = world(rng.normal(size=5).tolist(), rng.integers(100, 5000, 5).tolist())
        shares, tau = natural(tokens), 0.7
        bounds = Bounds.of(tokens, 0.04, set(), sum(tokens.values()), 1.6)
        r, n = np.array(list(rho.values())), np.array(list(shares.values()))
        low, high = (np.array(list(side.values())) for side in (bounds.low, bounds.high))
        w = n.copy()
        for _ in range(4000):
            y = w * np.exp(0.02 * (r - tau * (np.log(w / n) + 1)))
            lo, hi = 1e-6, 1e6
            for _ in range(100):
                middle = math.sqrt(lo * hi)
                lo, hi = (middle, hi) if np.clip(middle * y, low, high).sum() < 1 else (lo, middle)
            w = np.clip(lo * y, low, high)
        assert list(tilt(shares, rho, tau, bounds).values()) == pytest.approx(w.tolist(), abs=1e-6)


@PROPERTIES
@given(worlds, st.floats(-5, 5), st.permutations(range(6)), st.floats(0.1, 10))
def test_shift_scale_and_order_do_not_matter_and_better_means_more(
    drawn: tuple, shift: float, order: list[int], scale: float
) -> None:
    rho, tokens = world(*drawn[:2])
    shares, tau = natural(tokens), drawn[2]
    bounds = Bounds.of(tokens, 0.01, set(), None, None)
    weights = tilt(shares, rho, tau, bounds)
    assert tilt(shares, {n: v + shift for n, v in rho.items()}, tau, bounds) == pytest.approx(weights, abs=1e-9)
    assert tilt(shares, {n: v * scale for n, v in rho.items()}, tau * scale, bounds) == pytest.approx(weights, abs=1e-9)
    names = [NAMES[i] for i in order if NAMES[i] in rho]
    assert tilt({n: shares[n] for n in names}, rho, tau, bounds) == pytest.approx(weights, abs=1e-9)
    first = next(iter(rho))
    more = tilt(shares, {**rho, first: rho[first] + 0.5}, tau, bounds)
    assert more[first] >= weights[first] - 1e-12


def test_limits_of_tau() -> None:
    tokens = {"a": 700, "b": 200, "c": 100}
    shares, rho = natural(tokens), {"a": -1.0, "b": 0.5, "c": 1.0}
    assert tilt(shares, rho, 1e9, free(tokens)) == pytest.approx(shares, abs=1e-8)
    # tau to 0 is greedy: the best source up to its cap, then the next, however small exp(rho / tau) becomes.
    capped = Bounds.of(tokens, 0.0, set(), 1000, 3.0)
    assert tilt(shares, rho, 1e-4, capped) == pytest.approx({"a": 0.1, "b": 0.6, "c": 0.3}, abs=1e-9)


def test_boxed_agrees_with_share_row_by_row() -> None:
    rng = np.random.default_rng(1)
    tokens = dict(zip(NAMES, rng.integers(100, 1000, 6).tolist()))
    bounds = Bounds.of(tokens, 0.03, {"f"}, 2000, 2.5)
    low, high = (np.array([side[n] for n in NAMES]) for side in (bounds.low, bounds.high))
    rows = np.maximum(rng.normal(0.5, 1, (200, 6)), 0.0)
    with np.errstate(divide="ignore"):
        found = boxed(np.log(rows), low, high)
    solved = 0
    for row, weights in zip(rows, found):
        try:
            expected = share(dict(zip(NAMES, row.tolist())), bounds)
        except (ConfigError, DataError):
            assert np.isnan(weights).all()
            continue
        solved += 1
        assert weights.tolist() == pytest.approx(list(expected.values()), abs=1e-9)
    assert 20 < solved < 200


def test_rows_without_solution_are_marked() -> None:
    low, high = np.array([0.0, 0.0]), np.array([0.4, 0.5])
    assert np.isnan(boxed(np.zeros((1, 2)), low, high)).all()
    assert np.isnan(boxed(np.full((1, 2), -np.inf), low, np.ones(2))).all()
    assert boxed(np.full((1, 2), -np.inf), np.array([0.5, 0.5]), np.ones(2)).tolist() == [[0.5, 0.5]]


def test_bad_numbers_and_tight_caps_are_refused() -> None:
    tokens = {"a": 10, "b": 10}
    with pytest.raises(DataError, match=r"finite benefits[\s\S]*nan[\s\S]*make the influence artifact again"):
        tilt(natural(tokens), {"a": float("nan"), "b": 1.0}, 1.0, free(tokens))
    with pytest.raises(ConfigError, match=r"room for 40.0 %[\s\S]*raise max_epochs"):
        tilt(natural(tokens), {"a": 0.0, "b": 1.0}, 1.0, Bounds.of(tokens, 0.0, set(), 100, 2.0))


def test_divergence_and_effective_sources_by_hand() -> None:
    assert effective_sources({"a": 0.25, "b": 0.25, "c": 0.5}) == pytest.approx(2**1.5)
    assert effective_sources({"a": 1.0, "b": 0.0}) == 1.0
    assert divergence({"a": 0.5, "b": 0.5}, {"a": 0.25, "b": 0.75}) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert divergence({"a": 1.0}, {"a": 1.0}) == 0.0
