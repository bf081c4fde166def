"""Documents, and parts of documents, as one long stream of tokens, without copying them."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_r1.data.shards import Shard
from megatron_r1.utils.errors import DataError

Ranges = tuple[np.ndarray, np.ndarray]
"""Starts and ends int64[n] of half-open ranges of a shard's tokens (all documents end to end), ascending and disjoint."""


class Windows(NamedTuple):
    """Equally long stretches of a stream, and the pieces of documents they are made of, in order, none empty.

    tokens [k, n] of the shard's type; row, begin, document int64[p]: piece i starts at column begin[i] of window row[i], ends where the next
    begins or the window ends, and belongs to document document[i] of the shard. repeated bool[p]: its first token is there as
    context only, and was a target before.
    """

    tokens: np.ndarray
    row: np.ndarray
    begin: np.ndarray
    document: np.ndarray
    repeated: np.ndarray


class TokenStream:
    """The (kept) documents of a shard, end to end, without the tokens that were `consumed` already.

    keep: None for all documents, a bool array [documents], or an int array of document numbers in the wanted order (ascending
    when something was consumed). What is left of a document is one or more pieces; one that does not begin with the document
    is preceded by the token before it, so that its first token can be predicted: that one is `repeated`, and no target again.
    """

    def __init__(self, shard: Shard, keep: np.ndarray | None = None, consumed: Ranges | None = None) -> None:
        self.shard = shard
        self.documents: np.ndarray | None = None
        """Number in the shard of the document of every piece; None: the whole shard as it is."""
        self._repeated: np.ndarray | None = None
        if keep is None and consumed is None:
            return
        documents = np.arange(len(shard)) if keep is None else document_numbers(shard, keep)
        starts, ends = shard.offsets[documents], shard.offsets[documents + 1]
        if consumed is not None:
            starts, ends = _without((starts, ends), consumed)
            documents = np.searchsorted(shard.offsets, starts, side="right") - 1
            self._repeated = starts > shard.offsets[documents]
            starts = starts - self._repeated
        self.documents, self._starts = documents, starts
        self.__dict__["offsets"] = np.concatenate([np.zeros(1, np.int64), np.cumsum(ends - starts, dtype=np.int64)])

    @cached_property
    def offsets(self) -> np.ndarray:
        """First token of every piece in the stream, and the end: int64[pieces + 1]. Of a whole shard they are first read when a window is."""
        return self.shard.offsets

    @property
    def n_tokens(self) -> int:
        """Tokens in the stream."""
        return self.shard.n_tokens if self.documents is None else int(self.offsets[-1])

    @property
    def n_fresh(self) -> int:
        """Tokens in the stream that are not repeated."""
        return self.n_tokens - (0 if self._repeated is None else int(self._repeated.sum()))

    def blocks(self, seq_length: int) -> int:
        """How many blocks of `seq_length` targets the stream holds (a block reads one token more than it predicts)."""
        return max(0, (self.n_tokens - 1) // seq_length)

    def windows(self, starts: np.ndarray, n: int) -> Windows:
        """The windows of n >= 1 tokens from `starts` int[k].

        O(log documents) to find each place, no loop over windows of a whole shard. Raises DataError outside the stream.
        """
        starts = np.asarray(starts, np.int64)
        if len(starts) == 0 or n < 1 or starts.min() < 0 or starts.max() + n > self.n_tokens:
            found = f"tokens {starts.min()} to {starts.max() + n}" if len(starts) else "none asked for"
            raise DataError(expected=f"ranges inside the {self.n_tokens} tokens of {self.shard.label}", found=found, fix="count blocks with TokenStream.blocks")
        offsets = self.offsets
        first = np.searchsorted(offsets, starts, side="right") - 1
        many = np.searchsorted(offsets, starts + n, side="left") - first
        row = np.repeat(np.arange(len(starts)), many)
        place = np.arange(len(row)) + np.repeat(first - (np.cumsum(many) - many), many)
        start = starts[row]
        begin = np.maximum(offsets[place], start)
        solid = np.minimum(offsets[place + 1], start + n) > begin
        row, place, start, begin = row[solid], place[solid], start[solid], begin[solid]
        pieces = row, begin - start
        if self.documents is None:
            return Windows(self.shard.windows(starts, n), *pieces, place, np.zeros(len(row), bool))
        # Where the tokens are in the shard, and where they go. Neighbours in both are copied together.
        source, target = self._starts[place] + begin - offsets[place], row * n + begin - start
        runs = np.flatnonzero(np.diff(source - target, prepend=-1 - int(target[-1])))
        tokens = np.empty(len(starts) * n, self.shard.dtype)
        edges = np.append(target[runs], len(tokens)).tolist()
        for i, at in enumerate(source[runs].tolist()):
            tokens[edges[i] : edges[i + 1]] = self.shard.read(at, edges[i + 1] - edges[i])
        repeated = np.zeros(len(row), bool) if self._repeated is None else self._repeated[place] & (begin == offsets[place])
        return Windows(tokens.reshape(-1, n), *pieces, self.documents[place], repeated)

    def ranges_of(self, blocks: np.ndarray, seq_length: int) -> Ranges:
        """Tokens of the shard that are targets of these blocks (distinct numbers, any order).

        The first token of the stream, which nothing precedes, counts with block 0.
        """
        blocks = np.sort(np.asarray(blocks, np.int64))
        first = blocks[np.diff(blocks, prepend=-2) != 1]
        last = blocks[np.diff(blocks, append=np.iinfo(np.int64).max) != 1]
        starts, ends = np.where(first == 0, 0, first * seq_length + 1), (last + 1) * seq_length + 1
        if self.documents is None:
            return starts, ends
        context = np.zeros(0, np.int64) if self._repeated is None else self.offsets[:-1][self._repeated]
        cuts = _distinct(starts, ends, self.offsets, context + 1)
        read = _covers(starts, ends, cuts[:-1]) & ~_covers(context, context + 1, cuts[:-1])
        begins, lengths = cuts[:-1][read], np.diff(cuts)[read]
        piece = np.searchsorted(self.offsets, begins, side="right") - 1
        found = self._starts[piece] + begins - self.offsets[piece]
        return union((found, found + lengths))


def document_numbers(shard: Shard, keep: np.ndarray) -> np.ndarray:
    """int64 numbers of the documents that flags or numbers mean. Raises DataError for flags or numbers of other shards."""
    keep = np.asarray(keep)
    if keep.dtype == bool and len(keep) != len(shard):
        raise DataError(
            expected=f"one keep flag for each of the {len(shard)} documents of {shard.label}", found=f"{len(keep)} flags",
            fix="use the mixture together with the shards it was made for",
        )
    numbers = np.flatnonzero(keep) if keep.dtype == bool else keep.astype(np.int64)
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(shard):
        raise DataError(
            expected=f"document numbers below {len(shard)} in {shard.label}", found=f"{int(numbers.min())} to {int(numbers.max())}",
            fix="use the mixture together with the shards it was made for",
        )
    return numbers


def union(*parts: Ranges) -> Ranges:
    """All tokens of any of these ranges, which may overlap and come in any order, as ascending ranges that do not touch."""
    starts, ends = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    new = np.append(True, starts[1:] > ends[:-1])[: len(starts)]
    return starts[new], ends[np.append(new[1:], True)[: len(starts)]]


def _without(ranges: Ranges, taken: Ranges) -> Ranges:
    """What is left of ranges; each is cut by itself, so that ranges that touch stay apart."""
    cuts = _distinct(*ranges, *taken)
    begins = cuts[:-1]
    left = _covers(*ranges, begins) & ~_covers(*taken, begins)
    return begins[left], cuts[1:][left]


def _distinct(*places: np.ndarray) -> np.ndarray:
    return np.unique(np.concatenate(places))


def _covers(starts: np.ndarray, ends: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Which places lie in one of the (ascending, disjoint) ranges."""
    return np.searchsorted(starts, places, side="right") > np.searchsorted(ends, places, side="right")
