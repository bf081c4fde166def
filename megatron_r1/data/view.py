"""Documents as one long stream of tokens, without copying them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_r1.data.shards import Shard
from megatron_r1.utils.errors import DataError


class Windows(NamedTuple):
    """Equally long stretches of a stream, and the pieces of documents they are made of, in order, none empty.

    tokens int32[k, n]; row, begin, document int64[p]: piece i starts at column begin[i] of window row[i], ends where the next
    begins or the window ends, and belongs to document document[i] of the shard.
    """

    tokens: np.ndarray
    row: np.ndarray
    begin: np.ndarray
    document: np.ndarray


class TokenStream:
    """The (kept) documents of a shard, end to end.

    keep: None for all documents, a bool array [documents], or an int array of document numbers in the wanted order.
    """

    def __init__(self, shard: Shard, keep: np.ndarray | None = None) -> None:
        self.shard = shard
        self.documents: np.ndarray | None = None
        self.offsets = shard.offsets
        """First token of every document in the stream, and the end: int64[documents + 1]."""
        if keep is None:
            return
        keep = np.asarray(keep)
        if keep.dtype == bool and len(keep) != len(shard):
            raise DataError(
                expected=f"one keep flag for each of the {len(shard)} documents of {shard.label}", found=f"{len(keep)} flags",
                fix="use the mixture together with the shards it was made for",
            )
        self.documents = np.flatnonzero(keep) if keep.dtype == bool else keep.astype(np.int64)
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(shard.lengths[self.documents], dtype=np.int64)])

    @property
    def n_tokens(self) -> int:
        """Tokens in the stream."""
        return int(self.offsets[-1])

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
        first = np.searchsorted(self.offsets, starts, side="right") - 1
        many = np.searchsorted(self.offsets, starts + n, side="left") - first
        row = np.repeat(np.arange(len(starts)), many)
        place = np.arange(len(row)) + np.repeat(first - (np.cumsum(many) - many), many)
        start = starts[row]
        begin = np.maximum(self.offsets[place], start)
        solid = np.minimum(self.offsets[place + 1], start + n) > begin
        row, place, start, begin = row[solid], place[solid], start[solid], begin[solid]
        pieces = row, begin - start
        if self.documents is None:
            return Windows(self.shard.windows(starts, n).astype(np.int32), *pieces, place)
        document = self.documents[place]
        # Where the tokens are in the shard, and where they go. Neighbours in both are copied together.
        source, target = self.shard.offsets[document] + begin - self.offsets[place], row * n + begin - start
        runs = np.flatnonzero(np.diff(source - target, prepend=-1 - int(target[-1])))
        tokens = np.empty(len(starts) * n, np.int32)
        edges = np.append(target[runs], len(tokens)).tolist()
        for i, at in enumerate(source[runs].tolist()):
            tokens[edges[i] : edges[i + 1]] = self.shard.read(at, edges[i + 1] - edges[i])
        return Windows(tokens.reshape(-1, n), *pieces, document)
