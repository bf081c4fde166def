"""Best-fit decreasing: conversations into blocks with little padding, in time linear in their number.

Conversations of one length are placed together, blocks of one remaining room together. A block with room r, the smallest that
holds an item of length l, also holds the next items of that length until less than l is left: best fit gives it floor(r / l) of
them one after the other. So a group of blocks takes floor(r / l) items each in one step, its room at least halves, and the
number of steps depends on the number of different lengths, not on the number of items, whose share of the work is numpy's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_r1.utils.errors import DataError


@dataclass(frozen=True)
class Rows:
    """Items by row: row i holds items[offsets[i] : offsets[i + 1]]. `items` int64[n], `offsets` int64[rows + 1]."""

    items: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """Rows."""
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Items of one row, longest first: int64."""
        return self.items[self.offsets[row] : self.offsets[row + 1]]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> Rows:
    """Put items of `lengths` int[n] into as few rows of `capacity` as the heuristic finds; every item lands in exactly one.

    Longest first; each goes where it leaves the least room, so no row holds more than `capacity`. At most 11/9 optimal + 6/9 rows
    (Johnson 1974). O(n) time and memory, plus a term that grows with the number of different lengths. An item longer than
    `capacity` gets a row of its own; the caller cuts it. Equal lengths keep their order. Raises DataError for a length below 1.
    """
    lengths = np.minimum(np.asarray(lengths, np.int64), capacity)
    if len(lengths) and lengths.min() < 1:
        raise DataError(expected="lengths of at least one token", found=f"{lengths.min()}", fix="leave empty conversations out")
    order = _stable_order(capacity - lengths)
    counts = np.bincount(lengths, minlength=1)
    first, blocks, each = _place([(int(length), int(counts[length])) for length in np.flatnonzero(counts)[::-1]], capacity)
    # Steps took the items in order, so the row of every item is: for each step its blocks, each as often as it took items.
    step = np.repeat(np.arange(len(first)), blocks)
    row = first[step] + np.arange(len(step)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    row = np.repeat(row, each[step])
    return Rows(order[_stable_order(row)], np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(row), dtype=np.int64)]))


def _place(groups: list[tuple[int, int]], capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps (first row, rows, items each takes), int64 each, for (length, items) in falling order of length."""
    steps: list[tuple[int, int, int]] = []
    waiting: dict[int, list[tuple[int, int]]] = {}  # room -> (first row, rows) of groups of neighbours
    rooms = 0  # bit r is set where there is a row with room r
    rows = 0
    for length, items in groups:
        while items:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                first, many = waiting[room].pop()
                if not waiting[room]:
                    rooms ^= 1 << room
            else:
                room, first, many = capacity, rows, -(-items // (capacity // length))
                rows += many
            each = room // length
            full = min(many, items // each)
            rest = items - full * each if full < many else 0
            parts = [(first, full, each)] if full else []
            if rest:
                parts.append((first + full, 1, rest))
            if full + (rest > 0) < many:
                parts.append((first + full + (rest > 0), many - full - (rest > 0), 0))
            for start, wide, taken in parts:
                left = room - taken * length
                if taken:
                    steps.append((start, wide, taken))
                if left:
                    waiting.setdefault(left, []).append((start, wide))
                    rooms |= 1 << left
            items -= full * each + rest
    placed = np.asarray(steps, np.int64).reshape(-1, 3)
    return placed[:, 0], placed[:, 1], placed[:, 2]


def _stable_order(keys: np.ndarray) -> np.ndarray:
    """np.argsort(keys, kind="stable") of numbers >= 0, linear: 16 bits at a time, for which numpy counts instead of comparing."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    top, shift = int(keys.max(initial=0)), 16
    while top >> shift:
        order = order[np.argsort((keys[order] >> shift & 0xFFFF).astype(np.uint16), kind="stable")]
        shift += 16
    return order
