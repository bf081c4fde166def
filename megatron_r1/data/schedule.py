"""Weights that change while a phase runs: an order in pieces, each a mixture's, with the interface of one.

Cursors go from piece to piece, so nothing is lost or repeated. Every piece begins its own count: within a piece, shares are within `max_error` of
a sample of the piece's weights, from its first sample on.

Sources may be capped. The sample at which a source reaches its cap is computed (counts never fall, so by bisection) before the
first sample is drawn, and another piece begins there in which the other sources have its share, in proportion to their own.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megatron_r1.data.mixture_order import Located, MixtureOrder, Rest
from megatron_r1.utils.errors import DataError


class Capped(NamedTuple):
    """A source that has no share from sample `sample` on, because it reached its cap."""

    sample: int
    source: str


class ScheduledOrder:
    """The order of samples under weights that change.

    pieces: (first sample, weights), ascending from 0; limits: source -> count (as `counts` counts) at which it is read no further; total:
    samples that will be drawn, looked through for caps. Other arguments and the interface: MixtureOrder's.
    Raises DataError when all sources reach their caps before `total`.
    """

    def __init__(
        self, blocks: Mapping[str, int], pieces: Sequence[tuple[int, Mapping[str, float]]], seed: int, start: Mapping[str, int] | None = None,
        rest: Mapping[str, Rest] | None = None, limits: Mapping[str, int] | None = None, total: int = 0,
    ) -> None:
        firsts = [int(first) for first, _ in pieces]
        if not firsts or firsts[0] != 0 or any(b <= a for a, b in pairwise(firsts)):
            raise DataError(expected="pieces of a schedule that begin at sample 0 and ascend", found=str(firsts[:8]), fix="correct the starts in the schedule")
        self.capped: list[Capped] = []
        self._firsts: list[int] = []
        self._pieces: list[MixtureOrder] = []
        at = {name: int((start or {}).get(name, 0)) for name in blocks}
        closed = {name for name, limit in (limits or {}).items() if at[name] >= limit}
        self.capped += [Capped(0, name) for name in sorted(closed) if any(weights.get(name, 0) > 0 for _, weights in pieces)]
        for (_, weights), first, end in zip(pieces, firsts, [*firsts[1:], None]):
            if total and first >= total:
                break
            while True:
                order = MixtureOrder(blocks, self._open(weights, closed, first, total), seed, at, rest)
                self._firsts.append(first)
                self._pieces.append(order)
                until = total if end is None else end
                full = _first_full(order, limits or {}, until - first)
                if full is None:
                    at = order.counts(max(0, until - first))
                    break
                length, names = full
                first, at = first + length, order.counts(length)
                closed.update(names)
                if first >= total:
                    break
                self.capped += [Capped(first, name) for name in names]
                if end is not None and first >= end:
                    break
        self.blocks, self.start, self.rest, self.seed = self._pieces[0].blocks, self._pieces[0].start, self._pieces[0].rest, self._pieces[0].seed
        self.names = sorted({name for order in self._pieces for name in order.names})
        """Sources that have a share at some time, as `locate_many` numbers them."""
        self.max_error = max(order.max_error for order in self._pieces)
        numbers = {name: i for i, name in enumerate(self.names)}
        self._numbers = [np.asarray([numbers[name] for name in order.names]) for order in self._pieces]
        drawn = self.counts(total) if total else {}
        self.weights = {name: (drawn[name] - self.start[name]) / total if total else self._pieces[0].weights.get(name, 0.0) for name in self.names}
        """Share of every source in the first `total` samples."""

    @property
    def pieces(self) -> list[tuple[int, dict[str, float]]]:
        """(first sample, weights) of what is really drawn."""
        return [(first, dict(order.weights)) for first, order in zip(self._firsts, self._pieces)]

    @property
    def fingerprint(self) -> str:
        """As MixtureOrder's."""
        return hashlib.sha256(json.dumps([self._firsts, [order.fingerprint for order in self._pieces]]).encode()).hexdigest()[:16]

    def counts(self, n_samples: int) -> dict[str, int]:
        """As MixtureOrder's."""
        piece = bisect_right(self._firsts, n_samples) - 1
        return self._pieces[piece].counts(n_samples - self._firsts[piece])

    def locate(self, sample_index: int) -> Located:
        """As MixtureOrder's."""
        piece = max(0, bisect_right(self._firsts, sample_index) - 1)
        return self._pieces[piece].locate(sample_index - self._firsts[piece])

    def locate_many(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As MixtureOrder's."""
        index = np.asarray(indices, np.int64)
        which = np.maximum(0, np.searchsorted(self._firsts, index, side="right") - 1)
        found = np.empty((3, len(index)), np.int64)
        for piece in np.unique(which):
            mine = which == piece
            sources, blocks, epochs = self._pieces[piece].locate_many(index[mine] - self._firsts[piece])
            found[:, mine] = self._numbers[piece][sources], blocks, epochs
        return found[0], found[1], found[2]

    def position(self, source: str, count: int) -> tuple[int, int, int]:
        """As MixtureOrder's."""
        return self._pieces[0].position(source, count)

    def _open(self, weights: Mapping[str, float], closed: set[str], first: int, total: int) -> dict[str, float]:
        left = {name: weight for name, weight in weights.items() if name not in closed}
        if not any(weight > 0 for weight in left.values()) and any(weight > 0 for weight in weights.values()):
            raise DataError(
                expected=f"sources below their caps up to the last of {total} samples", found=f"all of them at their caps after {first} samples ({', '.join(sorted(weights)[:8])})",
                fix="raise max_epochs, add documents or sources, or shorten the budget",
            )
        return left


Order = MixtureOrder | ScheduledOrder


def _first_full(order: MixtureOrder, limits: Mapping[str, int], samples: int) -> tuple[int, list[str]] | None:
    """After how many of the first `samples` samples some source has reached its limit, and which have."""
    mine = {name: limits[name] for name in order.names if name in limits}

    def full(n: int) -> list[str]:
        counts = order.counts(n)
        return sorted(name for name, limit in mine.items() if counts[name] >= limit)

    if samples <= 0 or not mine or not full(samples):
        return None
    low, high = 0, samples
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if full(middle) else (middle, high)
    return high, full(high)


def interpolated(before: Mapping[str, float], after: Mapping[str, float], first: int, length: int, jumps: int) -> list[tuple[int, dict[str, float]]]:
    """Pieces that lead from one table of shares to another in `jumps` equal steps over `length` samples from `first` on.

    Shares (of sum 1 each) are those of the middle of every step's span; from `first + length` on they are `after`.
    """
    pieces: dict[int, dict[str, float]] = {}
    for i in range(jumps):
        part = (i + 0.5) / jumps
        pieces[first + length * i // jumps] = {name: (1 - part) * before.get(name, 0.0) + part * after.get(name, 0.0) for name in sorted({*before, *after})}
    return [*((at, shares) for at, shares in sorted(pieces.items()) if at < first + length), (first + length, dict(after))]
