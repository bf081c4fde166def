"""Shares under floors and caps: properties, hand-computed numbers, and refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.mixture.weights import Bounds, distance, natural, share, uniform
from megatron_r1.utils.errors import ConfigError, DataError

PROPERTIES = settings(max_examples=150, deadline=None)
bases = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e3)), min_size=2, max_size=8).filter(
    lambda values: max(values) > 0
)


def named(values: list[float]) -> dict[str, float]:
    return {f"s{i}": value for i, value in enumerate(values)}


def no_bounds(names: dict[str, float]) -> Bounds:
    return Bounds.of({name: 1000 for name in names}, 0.0, set(), None, None)


def test_without_bounds_it_is_proportional() -> None:
    base = {"a": 3.0, "b": 1.0, "c": 0.0}
    assert share(base, no_bounds(base)) == pytest.approx({"a": 0.75, "b": 0.25, "c": 0.0}, abs=1e-15)


def test_floor_by_hand() -> None:
    # c is lifted to 0.1; a and b share the other 0.9 as 3 : 1.
    base = {"a": 3.0, "b": 1.0, "c": 0.0}
    bounds = Bounds.of(dict.fromkeys(base, 10), 0.1, set(), None, None)
    assert share(base, bounds) == pytest.approx({"a": 0.675, "b": 0.225, "c": 0.1}, abs=1e-12)


def test_cap_by_hand() -> None:
    # a holds 100 tokens: 2 epochs of a 500-token budget are 0.4; the rest goes to b and c as 1 : 1.
    base = {"a": 8.0, "b": 1.0, "c": 1.0}
    bounds = Bounds.of({"a": 100, "b": 1000, "c": 1000}, 0.0, set(), 500, 2.0)
    assert share(base, bounds) == pytest.approx({"a": 0.4, "b": 0.3, "c": 0.3}, abs=1e-12)


@PROPERTIES
@given(bases, st.floats(0, 0.12), st.data())
def test_sum_floor_and_zero_for_harmful(values: list[float], floor: float, data: st.DataObject) -> None:
    base = named(values)
    harmful = {name for name, value in base.items() if value == 0 and data.draw(st.booleans())}
    weights = share(base, Bounds.of(dict.fromkeys(base, 10), floor, harmful, None, None))
    assert math.fsum(weights.values()) == pytest.approx(1.0, abs=1e-12)
    assert all(weights[name] == 0.0 for name in harmful)
    assert all(weights[name] >= floor - 1e-12 for name in base if name not in harmful)


@PROPERTIES
@given(bases, st.lists(st.integers(1, 1000), min_size=8, max_size=8), st.floats(0.5, 4))
def test_caps_hold_or_are_refused(values: list[float], counts: list[int], epochs: float) -> None:
    base = named(values)
    tokens = dict(zip(base, counts))
    bounds = Bounds.of(tokens, 0.002, set(), 1000, epochs)
    room = sum(bounds.high[name] if value > 0 else bounds.low[name] for name, value in base.items())
    if room < 1 - 1e-9:
        with pytest.raises(ConfigError) as caught:
            share(base, bounds)
        tightest = min((name for name, value in base.items() if value > 0), key=lambda name: bounds.high[name])
        assert tightest in caught.value.found
        assert "max_epochs" in caught.value.fix
        return
    weights = share(base, bounds)
    assert math.fsum(weights.values()) == pytest.approx(1.0, abs=1e-9)
    assert all(weights[name] <= bounds.high[name] + 1e-9 for name in base)


@PROPERTIES
@given(bases)
def test_order_of_benefit_is_order_of_weight(values: list[float]) -> None:
    base = named(values)
    weights = share(base, Bounds.of(dict.fromkeys(base, 10), 0.01, set(), None, None))
    by_base = sorted(base, key=base.__getitem__)
    assert all(weights[a] <= weights[b] + 1e-12 for a, b in pairwise(by_base))


def test_scale_does_not_matter() -> None:
    base = named([0.3, 1.7, 0.0, 4.0])
    bounds = Bounds.of(dict.fromkeys(base, 10), 0.02, set(), None, None)
    tiny = share({name: 1e-9 * value for name, value in base.items()}, bounds)
    assert tiny == pytest.approx(share(base, bounds), abs=1e-12)


def test_floors_above_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="lower `floor`"):
        Bounds.of(dict.fromkeys("abcdefghijk", 10), 0.1, set(), None, None)


def test_nothing_positive_is_refused() -> None:
    base = {"a": 0.0, "b": 0.0}
    with pytest.raises(DataError, match="gains nothing more"):
        share(base, no_bounds(base))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_not_a_number_is_refused(bad: float) -> None:
    base = {"a": 1.0, "b": bad}
    with pytest.raises(DataError, match="finite, non-negative"):
        share(base, no_bounds(base))


def test_baselines() -> None:
    assert uniform(["a", "b", "c", "d"]) == dict.fromkeys("abcd", 0.25)
    assert natural({"a": 30, "b": 10}) == {"a": 0.75, "b": 0.25}
    assert distance({"a": 0.75, "b": 0.25}, {"b": 1.0}) == pytest.approx(0.75)
    assert distance(uniform(["a", "b"]), uniform(["a", "b"])) == 0.0


def test_solution_is_the_fixed_point_of_the_rule() -> None:
    """Independent oracle: find lambda by bisection."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        base = named(rng.exponential(size=6).tolist())
        tokens = dict(zip(base, rng.integers(200, 900, 6).tolist()))
        bounds = Bounds.of(tokens, 0.05, set(), 1000, 1.0)
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            total = sum(min(max(middle * base[n], bounds.low[n]), bounds.high[n]) for n in base)
            low, high = (middle, high) if total < 1 else (low, middle)
        expected = {n: min(max(low * base[n], bounds.low[n]), bounds.high[n]) for n in base}
        assert share(base, bounds) == pytest.approx(expected, abs=1e-9)
