"""Packing: everything once, nothing too full, close to the best."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.packing import best_fit_decreasing


def slow(lengths, capacity):
    """Best-fit decreasing as the textbook says it, for the number of blocks."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            best = min(fitting, key=lambda i: rooms[i])
            rooms[best] -= length
        else:
            rooms.append(max(capacity - length, 0))
    return len(rooms)


@given(st.lists(st.integers(1, 64), max_size=80))
@settings(max_examples=80, deadline=None)
def test_against_the_textbook(lengths):
    blocks = best_fit_decreasing(np.asarray(lengths, int), 64)
    assert sorted(i for block in blocks for i in block) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in block) <= 64 for block in blocks)
    assert len(blocks) == slow(lengths, 64)


def test_an_item_that_is_too_long_is_alone():
    assert best_fit_decreasing(np.asarray([3, 100, 4]), 10) == [[1], [2, 0]]


def test_many_items_fill_blocks_well_and_quickly():
    lengths = np.random.default_rng(0).integers(1, 512, 50_000)
    blocks = best_fit_decreasing(lengths, 512)
    assert lengths.sum() / (len(blocks) * 512) > 0.99
