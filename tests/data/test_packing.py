"""Packing: everything once, nothing too full, exactly what best fit gives, and full."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.packing import Rows, best_fit_decreasing
from megatron_r1.utils.errors import DataError


def slow(lengths, capacity):
    """Best-fit decreasing as the textbook says it, item by item: the room left in every row."""
    rooms = []
    for length in sorted((min(length, capacity) for length in lengths), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def fewest(lengths, capacity):
    """The least number of rows any packing needs, by trying all (a few items only)."""
    best = len(lengths)
    for rows in itertools.product(range(len(lengths)), repeat=len(lengths)):
        sums = np.bincount(rows, weights=lengths)
        if sums.max() <= capacity:
            best = min(best, np.count_nonzero(sums))
    return best


def packed(lengths, capacity):
    """The rows, after checking what always holds."""
    lengths = np.asarray(lengths, np.int64)
    rows = best_fit_decreasing(lengths, capacity)
    assert np.sort(rows.items).tolist() == list(range(len(lengths)))
    for row in (rows[i] for i in range(len(rows))):
        assert len(row)
        assert lengths[row].clip(max=capacity).sum() <= capacity
        # Longest first, and equal lengths in the order they came in.
        assert np.lexsort((row, -lengths[row].clip(max=capacity))).tolist() == list(range(len(row)))
    return rows


@given(st.lists(st.integers(1, 70), max_size=80), st.integers(1, 64))
@settings(max_examples=150, deadline=None)
def test_against_the_textbook(lengths, capacity):
    rows = packed(lengths, capacity)
    rooms = [capacity - np.clip(np.asarray(lengths)[rows[i]], None, capacity).sum() for i in range(len(rows))]
    assert sorted(rooms) == slow(lengths, capacity)


@given(st.lists(st.tuples(st.integers(1, 200_000), st.integers(1, 40)), max_size=30), st.sampled_from([40, 1000, 70_000, 200_000]))
@settings(max_examples=60, deadline=None)
def test_many_of_the_same_length(groups, capacity):
    """Runs of equal lengths are placed in one step; keys above 2^16 are sorted in two passes."""
    lengths = [length for length, times in groups for _ in range(times)]
    rows = packed(lengths, capacity)
    assert len(rows) == len(slow(lengths, capacity))


@given(st.lists(st.integers(1, 10), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_within_the_bound_of_the_best(lengths):
    assert len(packed(lengths, 10)) <= 11 / 9 * fewest(lengths, 10) + 6 / 9


def test_an_item_that_is_too_long_is_alone():
    rows = packed([3, 100, 4], 10)
    assert [rows[i].tolist() for i in range(len(rows))] == [[1], [2, 0]]


def test_nothing_to_pack_and_what_cannot_be_packed():
    assert len(best_fit_decreasing(np.zeros(0, np.int64), 8)) == 0
    with pytest.raises(DataError, match="at least one token"):
        best_fit_decreasing(np.asarray([3, 0]), 8)


C = 32768


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: rng.lognormal(6.2, 1.3, n),
        lambda rng, n: (rng.pareto(1.1, n) + 1) * 120,
        lambda rng, n: rng.lognormal(9.0, 1.0, n),
        lambda rng, n: rng.integers(1, C + 1, n),
        lambda rng, n: np.where(rng.random(n) < 0.1, rng.lognormal(9.5, 0.8, n), rng.exponential(400, n)),
    ],
    ids=["log-normal", "Pareto", "long log-normal", "uniform", "reasoning and chat"],
)
def test_rows_of_long_tailed_lengths_are_full(draw):
    lengths = np.clip(draw(np.random.default_rng(0), 50_000), 2, C).astype(np.int64)
    rows = best_fit_decreasing(lengths, C)
    assert lengths.sum() >= 0.98 * len(rows) * C
    sums = np.add.reduceat(lengths[rows.items], rows.offsets[:-1])
    assert sums.max() <= C
    assert np.bincount(rows.items, minlength=len(lengths)).tolist() == [1] * len(lengths)
    again = best_fit_decreasing(lengths, C)
    assert isinstance(again, Rows)
    assert (again.items == rows.items).all()
