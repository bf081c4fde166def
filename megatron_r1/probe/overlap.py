"""Token n-grams as 64-bit numbers: duplicates, near duplicates and overlap with other documents.

n-grams are over tokens, not words: shards hold tokens only, and 13 tokens are fewer than 13 words, so the test is
stricter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_r1.data.ngrams import minhash, ngram_hashes

FILTER_BITS = 22
SKETCH = 64
SHINGLE = 5


class NearDuplicates:
    """Remembers kept windows and tells whether another is nearly the same: how large a share of the different 5-grams of the one with
    more of them both have, estimated from the smallest hashes. (Of windows of one size with Jaccard similarity J that is 2J / (1 + J).)"""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._owners: dict[int, list[int]] = {}
        self._kept = 0

    def seen(self, tokens: np.ndarray) -> bool:
        """True when the window reaches the threshold against a kept one; otherwise it is kept and remembered."""
        values = minhash(tokens, SHINGLE, SKETCH).tolist()
        shared = Counter(owner for value in values for owner in self._owners.get(value, ()))
        # Both sketches hold the smallest hashes: of the shared n-grams those that are small in the larger set, too.
        if shared and max(shared.values()) >= self.threshold * len(values):
            return True
        for value in values:
            self._owners.setdefault(value, []).append(self._kept)
        self._kept += 1
        return False


class OverlapIndex:
    """Which n-grams of some windows occur in a large body of tokens that is streamed past once."""

    def __init__(self, windows: Sequence[np.ndarray], n: int) -> None:
        self.n = n
        self._hashes = [np.unique(ngram_hashes(window, n)) for window in windows]
        self._all = np.unique(np.concatenate(self._hashes)) if windows else np.zeros(0, np.uint64)
        self._found = np.zeros(len(self._all), bool)
        # A bitmap of the leading bits throws out almost every streamed n-gram before the binary search.
        self._filter = np.zeros(1 << FILTER_BITS, bool)
        self._filter[self._slots(self._all)] = True

    @staticmethod
    def _slots(hashes: np.ndarray) -> np.ndarray:
        return (hashes >> np.uint64(64 - FILTER_BITS)).astype(np.int64)

    def stream(self, tokens: np.ndarray) -> None:
        """Look at one stretch of the body, int [t].

        n-grams across two stretches are not seen: overlap them by n - 1.
        """
        hashes = ngram_hashes(tokens, self.n)
        hashes = hashes[self._filter[self._slots(hashes)]]
        if not len(hashes) or not len(self._all):
            return
        place = np.minimum(np.searchsorted(self._all, hashes), len(self._all) - 1)
        self._found[place[self._all[place] == hashes]] = True

    def shares(self) -> np.ndarray:
        """Share of each window's distinct n-grams found so far, float [windows]; 0 for windows shorter than n."""
        shares = np.zeros(len(self._hashes))
        for i, hashes in enumerate(self._hashes):
            if len(hashes):
                shares[i] = self._found[np.searchsorted(self._all, hashes)].mean()
        return shares


def stretches(shard: Any, n: int, last: int, size: int = 1 << 20) -> Iterator[np.ndarray]:
    """The first `last` tokens of a shard in stretches of `size`, overlapping by n - 1 so that no n-gram is missed.

    n-grams across two documents hold an end-of-text token inside, so no window's n-gram equals them.
    """
    for start in range(0, min(last, shard.n_tokens), size):
        yield np.asarray(shard.read(start, min(size + n - 1, shard.n_tokens - start)))
